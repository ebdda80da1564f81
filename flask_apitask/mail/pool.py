from __future__ import annotations

import atexit
import collections
import contextvars
import logging
import math
import os
import queue
import threading
import time
import typing as t
import weakref

from ..exceptions import DeliveryError
from ..log import log
from .smtp import ConnectionLost
from .smtp import end_all
from .smtp import SMTPSession

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te

    from .envelope import Envelope
    from .envelope import SMTPSettings

logger = logging.getLogger(__name__)

# What a server that has enough connections says at these stages, if it says anything.
_OPENING = {"connect", "greeting", "TLS", "EHLO", "STARTTLS", "AUTH", "MAIL"}
_ENOUGH = {421, 432, 450, 451, 452, 454}
# Seconds after which one more connection is tried than the server has allowed.
_TRY_MORE_AFTER = 30.0

# Guards the state of all pools and of their closer. It is held for list operations and
# to start a thread, never for I/O.
_lock = threading.Lock()
_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()


# Guarantees
#
# -   At most ``size`` connections are open at once, those that are being closed too.
# -   Whoever waits longest is served first, and nobody overtakes.
# -   A connection is used by one thread at a time, and by the process that opened it.
# -   An idle connection is closed within ``keepalive`` seconds, if its server answers
#     QUIT at once. Nothing refers to its pool after that.
#
# Assumption: SimpleQueue.put() may be called anywhere, a destructor included, as it
# documents.
#
# Races, and what prevents them
#
# 1.  The closer finds nothing idle and is about to end; a connection is given back and
#     sees a closer. It would stay open. So the closer takes its name away under the
#     lock under which it finds nothing, and the connection starts another one.
# 2.  A thread that waits is interrupted as a place becomes free. The place would be
#     lost. So nobody is handed one: it is free, and the first in line takes it.
# 3.  A thread forks while another one holds the lock, which nobody in the child will
#     release. So the child gets a lock of its own, before it does anything else.


class ConnectionPool:
    """SMTP connections to one server, kept for the next message.

    .. code-block:: python

        with pool.connection() as connection:
            for envelope in batch:
                connection.send(envelope)

    :param size: Most connections that are open at once.
    :param keepalive: Seconds that an idle connection is kept. 0 closes it at the end of
        the ``with`` block, unless another thread waits for one.
    """

    def __init__(
        self, settings: SMTPSettings, *, size: int = 4, keepalive: float = 30.0
    ) -> None:
        self.settings = settings
        self.size = size
        self.keepalive = keepalive
        self.owner: object = None
        self._told = False
        self.begin()
        _pools.add(self)

    def begin(self) -> None:
        """Have no connections: in a new pool, and in the child of a fork."""
        # What each thread in line sleeps on; the first one is woken.
        self._waiting: collections.deque[threading.Condition] = collections.deque()
        # What the server allows, as far as is known, and when to try one more.
        self._limit = self.size
        self._try_more_at = 0.0
        # When the server was last heard of.
        self._heard_at = 0.0
        # Each has a place, open or not: len(in_use) + len(idle) <= size.
        self._in_use: set[SMTPSession] = set()
        # With the time at which each is to be closed, soonest first.
        self._idle: collections.deque[tuple[float, SMTPSession]] = collections.deque()

    def connection(self) -> PooledConnection:
        """Return a connection for a batch of messages, to be used in a ``with`` block.

        It is taken from the pool when the first message is sent, not before.
        """
        return PooledConnection(self)

    def acquire(self) -> SMTPSession:
        """Take the session used last, or one that is not open; wait for it if need be.

        While something is heard of the server, to wait is no error.

        :raises DeliveryError: None was free for the timeout, and nothing was heard.
        """
        began = time.monotonic()
        turn = threading.Condition(_lock)

        with _lock:
            self._waiting.append(turn)

            try:
                while self._waiting[0] is not turn or not self._has_room():
                    self._listen(self._in_use)
                    wait_until = max(began, self._heard_at) + self.settings.timeout

                    if wait_until <= time.monotonic():
                        raise self._none_free()

                    turn.wait(wait_until - time.monotonic())

                session = self._idle.pop()[1] if self._idle else None
                session = session or SMTPSession(self.settings)
                self._in_use.add(session)
                return session
            finally:
                self._waiting.remove(turn)
                self._changed()

    def _listen(self, sessions: cabc.Iterable[SMTPSession]) -> None:
        heard_at = (session.heard_at for session in sessions)
        self._heard_at = max([self._heard_at, *heard_at])

    def _has_room(self) -> bool:
        now = time.monotonic()

        if not self._idle and self._limit < self.size and self._try_more_at <= now:
            self._limit, self._try_more_at = self._limit + 1, now + _TRY_MORE_AFTER

        return bool(self._idle) or len(self._in_use) < self._limit

    def _none_free(self) -> DeliveryError:
        return DeliveryError(
            f"No connection to {self.settings} was free, and it was silent for"
            f" {self.settings.timeout:g} s (APITASK_MAIL_TIMEOUT): all"
            f" {len(self._in_use)} are in use and {len(self._waiting) - 1} more wait."
            " Allow more (APITASK_MAIL_CONNECTIONS), or send less at once."
        )

    def narrow(self, session: SMTPSession, error: DeliveryError) -> bool:
        """Take an error for the limit of a server, and close one session too many.

        :return: Whether it was that: others may do the work.
        """
        hung_up = isinstance(error, ConnectionLost) and not error.timed_out
        has_enough = error.smtp_code in ({None} | _ENOUGH if hung_up else _ENOUGH)

        if error.stage not in _OPENING or not has_enough:
            return False

        with _lock:
            others = len(self._in_use | {session for _, session in self._idle}) - 1

            if not others:
                # It lets nobody in, so that is no limit.
                self._limit = self.size
                return False

            self._limit = min(self._limit, others)
            self._try_more_at = time.monotonic() + _TRY_MORE_AFTER
            told, self._told = self._told, True

        if not told:
            log(
                logger,
                logging.INFO,
                "Fewer than %d connections are allowed by %s (%s at %s), so mail goes"
                " over those that work. Set APITASK_MAIL_CONNECTIONS to the limit.",
                self.size,
                self.settings,
                error.smtp_code or "a hang-up",
                error.stage,
            )

        end_all([session])
        self.forget([session])
        return True

    def release(self, session: SMTPSession) -> None:
        """Give a session back, and keep its connection if somebody may want it."""
        kept = False

        # Whatever happens here, a Ctrl-C say, the place is not to be lost with it.
        try:
            kept = session.usable() and self._keep(session)

            if not kept:
                end_all([session])
        finally:
            if not kept:
                session.close()
                self.forget([session])

    def forget(self, sessions: cabc.Iterable[SMTPSession]) -> None:
        """Free the places of sessions that were closed."""
        with _lock:
            self._listen(sessions)
            self._in_use.difference_update(sessions)
            self._changed()

    def close_idle(self) -> None:
        """Close what is idle now. The exit of the interpreter does it by itself."""
        with _lock:
            idle = self.take_idle()

        end_all(idle)
        self.forget(idle)
        _closer.alarm.put(None)

    def take_idle(self, until: float = math.inf) -> list[SMTPSession]:
        """Take what is to be closed by a time. Needs the lock."""
        taken = []

        while self._idle and self._idle[0][0] <= until:
            taken.append(self._idle.popleft()[1])

        self._in_use.update(taken)
        self._changed()
        return taken

    def _keep(self, session: SMTPSession) -> bool:
        with _lock:
            wanted = self.keepalive or self._waiting
            # One that was taken before a fork and used after it has no place here.
            if _closer.ended or not wanted or session not in self._in_use:
                return False

            self._listen([session])
            self._in_use.remove(session)
            # A thread that waits takes it at once.
            closes_at = time.monotonic() + (self.keepalive or 1.0)
            self._idle.append((closes_at, session))
            self._changed()
            return True

    def _changed(self) -> None:
        if self._waiting:
            self._waiting[0].notify()

        _closer.watch(self, self._idle[0][0] if self._idle else None)

    def __repr__(self) -> str:
        return (
            f"<ConnectionPool '{self.settings.host}:{self.settings.port}'"
            f" size={self.size} in_use={len(self._in_use)} idle={len(self._idle)}"
            f" waiting={len(self._waiting)}>"
        )


class PooledConnection:
    """The use of one connection of a pool, which is replaced as need be.

    It is for one thread at a time, and until the end of the ``with`` block.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._session: SMTPSession | None = None
        # Whether the server let the last message in, whatever became of it.
        self.is_reachable = False

    def __enter__(self) -> te.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        session, self._session = self._session, None

        if session is not None:
            self._pool.release(session)

    def send(self, envelope: Envelope) -> None:
        """Deliver a message. The next one can be sent however this one ended.

        It is sent a second time, on a new connection, only if the server can't have
        had all of it the first time: if a connection that was kept is found dead, or
        the server says 421.

        :raises DeliveryError: The message was not delivered to all recipients.
        :raises DeliveryUnknown: It may or may not have been delivered.
        """
        self.is_reachable = False
        narrowed, retried = 0, False

        while True:
            if self._session is None:
                self._session = self._pool.acquire()

            kept = self._session.usable()

            try:
                return self._deliver(self._session, envelope, kept)
            except DeliveryError as error:
                lost = isinstance(error, ConnectionLost) and (kept or error.busy)

                if not kept and self._pool.narrow(self._session, error):
                    self._session = None
                    narrowed += 1
                    again = narrowed <= self._pool.size
                else:
                    again = lost and not retried
                    retried = True

                if not again:
                    raise

                text = "%s It is tried again: %s"
                log(logger, logging.DEBUG, text, error, envelope.message_id)

    def _deliver(self, session: SMTPSession, envelope: Envelope, kept: bool) -> None:
        if not kept:
            self.is_reachable = False
            # One that has served its time.
            end_all([session])
            session.open()

        self.is_reachable = True
        session.deliver(envelope)


class ConnectionPools:
    """The connections of one app, a pool for each of the settings that it sends with.

    A pool lives as long as it is in use or has an idle connection. So an app may have
    settings for each of its tenants, and nothing is left of those that send no more.
    """

    def __init__(self) -> None:
        self._owner = object()
        self._pools: weakref.WeakValueDictionary[SMTPSettings, ConnectionPool]
        self._pools = weakref.WeakValueDictionary()

    def get(
        self, settings: SMTPSettings, *, size: int, keepalive: float
    ) -> ConnectionPool:
        """Return the one pool for these settings.

        :raises ValueError: The server's CA file can't be read.
        """
        settings.tls_context()

        with _lock:
            pool = self._pools.get(settings)

            if pool is None:
                pool = ConnectionPool(settings, size=size, keepalive=keepalive)
                pool.owner = self._owner
                self._pools[settings] = pool

            return pool

    def __del__(self) -> None:
        # An app has no end but this. The pools can't be looked up any more: its cycles
        # are collected, and weak references before all else.
        _closer.alarm.put(self._owner)


class _Closer:
    """The thread of the process that closes idle connections when their time is up."""

    def __init__(self) -> None:
        # Wakes the thread before its time, with an owner that is gone or with None.
        self.alarm: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        # When each pool that has something idle is due. They live by this alone.
        self._due: dict[ConnectionPool, float] = {}
        self._wakes_at = math.inf
        self.ended = False

    def watch(self, pool: ConnectionPool, due: float | None) -> None:
        """Look after a pool, unless it has nothing idle. Needs the lock."""
        if due is None:
            self._due.pop(pool, None)
            return

        self._due[pool] = due

        if self.thread is None:
            self._start()
        elif due < self._wakes_at:
            self.alarm.put(None)

    def _start(self) -> None:
        # One that is no daemon would keep the interpreter for the length of keepalive.
        self.thread = threading.Thread(
            target=self._run, name="apitask-mail-closer", daemon=True
        )

        try:
            # In an empty context, to keep nothing of the request that starts it.
            contextvars.Context().run(self.thread.start)
        except RuntimeError:
            # No thread can be had. The next connection that comes back tries again.
            self.thread = None

    def _run(self) -> None:
        gone: object = None

        while (pause := self._close_due(gone)) is not None:
            try:
                gone = self.alarm.get(timeout=pause)
            except queue.Empty:
                gone = None

    def _close_due(self, gone: object = None) -> float | None:
        """Close what is due, and return for how many seconds nothing will be.

        :param gone: An owner that is; all of its connections are due.
        """
        taken: dict[ConnectionPool, list[SMTPSession]] = {}

        with _lock:
            now = time.monotonic()

            for pool in list(self._due):
                whole = self.ended or (gone is not None and pool.owner is gone)
                taken[pool] = pool.take_idle(math.inf if whole else now)

            due = [session for sessions in taken.values() for session in sessions]

            if not (due or self._due):
                self.thread = None
                return None

            self._wakes_at = min(self._due.values(), default=math.inf)

        end_all(due)

        for pool, sessions in taken.items():
            pool.forget(sessions)

        return 0 if due else self._wakes_at - now

    def end(self) -> None:
        """Close all that is idle, and have nothing kept any more: the process exits."""
        with _lock:
            self.ended = True
            thread = self.thread

        if thread is not None:
            self.alarm.put(None)
            thread.join()

        self._close_due()


_closer = _Closer()
atexit.register(lambda: _closer.end())


def _after_fork() -> None:
    global _closer, _lock
    _lock = threading.Lock()
    _closer = _Closer()

    for pool in list(_pools):
        for session in [*pool._in_use, *(session for _, session in pool._idle)]:
            # Of the parent, which does not feel it.
            session.close()

        pool.begin()


# There is no fork everywhere.
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork)
