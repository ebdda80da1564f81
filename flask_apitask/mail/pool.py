from __future__ import annotations

import atexit
import collections
import contextlib
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
from .delivery import PooledConnection
from .smtp import end_all
from .smtp import SMTPSession

if t.TYPE_CHECKING:
    from .envelope import SMTPSettings

    Pools: t.TypeAlias = "weakref.WeakValueDictionary[SMTPSettings, ConnectionPool]"

logger = logging.getLogger(__name__)

# Seconds after which one more connection is tried than the server has allowed.
_TRY_MORE_AFTER = 30.0
# Seconds for which an idle connection is kept if others may need its place.
_SHORTLY = 1.0
_LIMIT = (
    "Fewer than %d connections are allowed by %s (%s at %s), so mail goes over those"
    " that work. Set APITASK_MAIL_CONNECTIONS to the limit."
)

# Guards all that follows, and the state of all pools. It is held for list operations
# and to start a thread, never for I/O.
_lock = threading.Lock()
_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()
# The servers whose limits an owner of pools was told of: a pool is soon gone.
_told: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()
# Those with idle connections, which live by this alone.
_idle_pools: set[ConnectionPool] = set()
# Closes those connections in time. It sleeps on the alarm, which anything may ring, the
# garbage collector too.
_closer: threading.Thread | None = None
_closer_wakes_at = 0.0
_alarm: queue.SimpleQueue[None] = queue.SimpleQueue()
_exiting = False


class ConnectionPool:
    """SMTP connections to one server, kept for the next message.

    At most ``size`` connections are open at once, those that are being closed too. One
    is used by one thread at a time, and by the process that opened it. Whoever waits
    longest is served first: a thread that sends mail after mail would else have its
    connection back before one that waits has woken.

    :param size: Most connections that are open at once.
    :param keepalive: Seconds that an idle connection is kept, half of the timeout at
        most. 0 closes it at the end of the ``with`` block, unless a thread waits.
    :param owner: Takes the idle connections along when it goes; the default never does.
    """

    def __init__(
        self,
        settings: SMTPSettings,
        *,
        size: int = 4,
        keepalive: float = 30.0,
        owner: object = None,
    ) -> None:
        self.settings = settings
        self.size = size
        # Where a server allows few, another process has its turn before it gives up.
        self.keepalive = min(keepalive, settings.timeout / 2)
        self._owner = weakref.ref(owner or self, _wake_closer)
        self.reset()
        _pools.add(self)

    def reset(self) -> None:
        """Have no connections: in a new pool, and in the child of a fork."""
        # What each thread in line sleeps on. Nobody is handed a place, which would be
        # lost if the wait is interrupted: the first in line is woken, and takes one.
        self._waiting: collections.deque[threading.Condition] = collections.deque()
        # Each has a place, open or not: len(in_use) + len(idle) <= size.
        self._in_use: set[SMTPSession] = set()
        # With the time at which each is to be closed, soonest first.
        self._idle: collections.deque[tuple[float, SMTPSession]] = collections.deque()
        # What the server allows, as far as is known, and until when that counts.
        self._limit, self._try_more_at = self.size, 0.0
        # When those that were given back last had a message taken, or a reply.
        self.taken_at = self._heard_at = 0.0

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
                    turn.wait(self._time_left(began))

                idle = self._idle.pop()[1] if self._idle else None
                session = idle or SMTPSession(self.settings)
                self._in_use.add(session)
                return session
            finally:
                self._waiting.remove(turn)
                self._wake_next()

    def _has_room(self) -> bool:
        now = time.monotonic()

        if not self._idle and self._limit < self.size and self._try_more_at <= now:
            self._limit, self._try_more_at = self._limit + 1, now + _TRY_MORE_AFTER

        return bool(self._idle) or len(self._in_use) < self._limit

    def _time_left(self, began: float) -> float:
        heard_at = [session.heard_at for session in self._in_use]
        ends_at = max([began, self._heard_at, *heard_at]) + self.settings.timeout

        if (left := ends_at - time.monotonic()) > 0:
            return left

        raise DeliveryError(
            f"No connection to {self.settings} was free, and it was silent for"
            f" {self.settings.timeout:g} s ({self.settings.timeout_key}): all"
            f" {len(self._in_use)} are in use and {len(self._waiting) - 1} more wait."
            " Allow more (APITASK_MAIL_CONNECTIONS), or send less at once."
        )

    def _wake_next(self) -> None:
        if self._waiting:
            self._waiting[0].notify()

    def narrow(self, session: SMTPSession, *, certain: bool, scarce: bool) -> bool:
        """Do without a connection from now on, if there are others that work.

        :param certain: It is about the connection. If in doubt, one that is being
            opened is as good: it may have what the server allows.
        :param scarce: Keep none for long, even if not: other processes need it, too.
        """
        with _lock:
            others = self._in_use - {session}
            working = [other for other in others if other.let_in or not certain]
            count = len(working) + len(self._idle)
            # If it lets nobody in, that is no limit.
            self._limit = min(self._limit, count) or self.size

            if count or scarce:
                self._try_more_at = time.monotonic() + _TRY_MORE_AFTER

            return count > 0

    def widen(self) -> None:
        """Take that back: it was no limit."""
        with _lock:
            self._limit, self._try_more_at = self.size, 0.0

    def opens_others(self, session: SMTPSession) -> bool:
        """Tell whether others are being opened, or work."""
        with _lock:
            others = self._in_use - {session}
            # Before its connect returns, it has no socket, and the server has it.
            return any(other.opening or other.sock for other in others)

    def tell(self, cause: int | str, stage: str) -> None:
        """Say once for an owner that a server has a limit, and by what it was found."""
        server = str(self.settings)

        with _lock:
            told = _told.setdefault(self._owner() or self, set())
            is_known = server in told
            told.add(server)

        if not is_known:
            found = self.size, self.settings, cause, stage
            log(logger, logging.INFO, _LIMIT, *found)

    def release(self, session: SMTPSession) -> None:
        """Give a session back, and keep its connection if somebody may want it."""
        kept = False

        # Whatever happens here, a Ctrl-C say, the place is not to be lost with it.
        try:
            kept = session.usable() and self._keep(session)
        finally:
            if not kept:
                self._discard([session])

    def _keep(self, session: SMTPSession) -> bool:
        with _lock:
            wanted = self.keepalive or self._waiting

            # One that was taken before a fork and used after it has no place here.
            if _exiting or not wanted or session not in self._in_use:
                return False

            now = time.monotonic()
            scarce = _SHORTLY if self._try_more_at > now else math.inf
            closes_at = now + min(self.keepalive or _SHORTLY, scarce)
            _watch(self, closes_at)
            self._free(session)
            sooner = [(min(due, closes_at), idle) for due, idle in self._idle]
            self._idle = collections.deque([*sooner, (closes_at, session)])
            return True

    def _discard(self, sessions: list[SMTPSession], until: float | None = None) -> None:
        try:
            end_all(sessions, until)
        finally:
            with _lock:
                for session in sessions:
                    self._free(session)

    def _free(self, session: SMTPSession) -> None:
        self._heard_at = max(self._heard_at, session.heard_at)
        self.taken_at = max(self.taken_at, session.taken_at)
        self._in_use.discard(session)
        self._wake_next()

    def close_idle(
        self, until: float = math.inf, deadline: float | None = None
    ) -> None:
        """Close what is idle now. The exit of the interpreter does it by itself.

        :param until: Close what is due by then, by the monotonic clock.
        :param deadline: When to wait for the server no longer; for 1 s by default.
        """
        due: list[SMTPSession] = []

        with _lock:
            if self._owner() is None:
                until = math.inf

            while self._idle and self._idle[0][0] <= until:
                due.append(self._idle.popleft()[1])

            self._in_use.update(due)

        self._discard(due, deadline)

        if until == math.inf:
            _wake_closer()

    def __repr__(self) -> str:
        return (
            f"<ConnectionPool '{self.settings.host}:{self.settings.port}'"
            f" size={self.size} in_use={len(self._in_use)} idle={len(self._idle)}"
            f" waiting={len(self._waiting)}>"
        )


def find_pool(pools: Pools, settings: SMTPSettings, **options: t.Any) -> ConnectionPool:
    """Return the pool for these settings, or make it with these options."""
    with _lock:
        pool = pools.get(settings)
        return pool or pools.setdefault(settings, ConnectionPool(settings, **options))


def _watch(pool: ConnectionPool, closes_at: float) -> None:
    """Have a pool's idle connection closed in time. Needs the lock."""
    global _closer
    _idle_pools.add(pool)

    if _closer is None:
        # One that is no daemon would keep the interpreter for the length of keepalive.
        closer = threading.Thread(
            target=_close_in_time, name="apitask-mail-closer", daemon=True
        )

        # If no thread can be had, the next connection that comes back tries again.
        with contextlib.suppress(RuntimeError):
            # In an empty context, to keep nothing of the request that starts it.
            contextvars.Context().run(closer.start)
            _closer = closer
    elif closes_at < _closer_wakes_at:
        _wake_closer()


def _wake_closer(_: object = None) -> None:
    _alarm.put(None)


def _close_in_time() -> None:
    while (wakes_at := _close_all(time.monotonic())) is not None:
        with contextlib.suppress(queue.Empty):
            _alarm.get(timeout=max(0, wakes_at - time.monotonic()))


def _close_all(until: float) -> float | None:
    """Close what is due by a time, and return when something is again."""
    global _closer, _closer_wakes_at
    deadline = time.monotonic() + 1

    with _lock:
        pools = list(_idle_pools)

    for pool in pools:
        pool.close_idle(until, deadline)

    with _lock:
        _idle_pools.difference_update([p for p in _idle_pools if not p._idle])

        if _idle_pools:
            _closer_wakes_at = min(pool._idle[0][0] for pool in _idle_pools)
            return _closer_wakes_at

        # Under the same lock: a connection that comes back now must not rely on it.
        _closer = None
        return None


def _end() -> None:
    """Close all that is idle, and have nothing kept any more: the process exits."""
    global _exiting

    with _lock:
        _exiting = True

    _close_all(math.inf)


def _after_fork() -> None:
    """Begin anew in a child, whose parent may hold the lock, and uses connections."""
    global _alarm, _closer, _lock
    _lock, _alarm, _closer = threading.Lock(), queue.SimpleQueue(), None
    _idle_pools.clear()

    for pool in list(_pools):
        for session in [*pool._in_use, *(session for _, session in pool._idle)]:
            session.close()

        pool.reset()


atexit.register(_end)
# There is no fork everywhere.
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork)
