from __future__ import annotations

import collections
import logging
import math
import os
import threading
import time
import typing as t
import weakref

from ..exceptions import DeliveryError
from ..log import log
from .connection import end_all
from .delivery import PooledConnection
from .reaper import reaper
from .smtp import SMTPSession

if t.TYPE_CHECKING:
    from .envelope import SMTPSettings

    Pools: t.TypeAlias = "weakref.WeakValueDictionary[SMTPSettings, ConnectionPool]"

logger = logging.getLogger(__name__)

# Seconds after which we try one more connection than the server has allowed.
_TRY_MORE_AFTER = 30.0
# Seconds to keep an idle connection if another process may need its place.
_SHORTLY = 1.0
_LIMIT = (
    "Fewer than %d connections are allowed by %s (%s at %s), so mail is sent over those"
    " that work. Set APITASK_MAIL_CONNECTIONS to the server's limit."
)

# All pools, whose connections a forked child must not use.
_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()
# The servers whose limits were logged, by the owner of the pools. A pool itself may be
# gone soon.
_told: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


class ConnectionPool:
    """Connections to one SMTP server, kept for further messages.

    At most ``size`` connections are open at once, including those being closed. A
    connection is used by one thread at a time, and only in the process that opened it.
    The thread that has waited longest is served first. Otherwise, a thread that sends
    mail after mail would take its connection back before a waiting thread wakes.

    :param size: Maximum number of connections open at once.
    :param keepalive: Seconds to keep an idle connection, at most half of the timeout.
        0 closes it at the end of the ``with`` block, unless a thread waits for it.
    :param owner: When this object is gone, the idle connections are closed. By default
        they are only closed in time.
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
        # If the server allows few connections, another process gets one before its own
        # timeout.
        self.keepalive = min(keepalive, settings.timeout / 2)
        self._owner = weakref.ref(owner or self, reaper.wake)
        self.reset()
        _pools.add(self)

    def reset(self) -> None:
        """Start with no connections, in a new pool or a forked child."""
        # Each thread in line sleeps on one of these. Places are not handed over, as one
        # would be lost with an interrupted wait. The first in line wakes and takes one.
        self._waiting: collections.deque[threading.Condition] = collections.deque()
        # Each session has a place, open or not: len(in_use) + len(idle) <= size. If an
        # interrupt keeps one from getting to whoever would give it back, it is dropped.
        self._in_use: weakref.WeakSet[SMTPSession] = weakref.WeakSet()
        # With the time at which to close each, soonest first.
        self._idle: collections.deque[tuple[float, SMTPSession]] = collections.deque()
        # The server's limit, as far as is known, and when to try one more.
        self._limit, self._try_more_at = self.size, 0.0
        # When the server last took a message from, or answered, a session that has been
        # given back.
        self.taken_at = self._heard_at = 0.0

    def connection(self) -> PooledConnection:
        """Return a connection for a batch of messages, for use in a ``with`` block.

        It is only taken from the pool when the first message is sent.
        """
        return PooledConnection(self)

    def acquire(self) -> SMTPSession:
        """Take the session used last or a new one, waiting for a place if need be.

        Waiting is no error as long as the server is heard from.

        :raises DeliveryError: For the whole timeout, no place was free and the server
            was silent.
        """
        began = time.monotonic()
        turn = threading.Condition(reaper.lock)

        with reaper.lock:
            # In the same try as its removal: a turn that was left in line by an
            # interrupt would hold up all behind it.
            try:
                self._waiting.append(turn)

                while self._waiting[0] is not turn:
                    # An interrupt may come before the wake-up, so look again anyway.
                    turn.wait(self.settings.timeout)

                while not self._has_room():
                    turn.wait(self._time_left(began))

                if self._idle:
                    session = self._idle.pop()[1]
                    # The server had nothing to say while the connection was idle.
                    self._heard_at = time.monotonic()
                else:
                    session = SMTPSession(self.settings)

                self._in_use.add(session)
                return session
            finally:
                if turn in self._waiting:
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
            f"No connection to {self.settings} was free, and the server was silent for"
            f" {self.settings.timeout:g} s ({self.settings.timeout_key}): all"
            f" {len(self._in_use)} are in use, and {len(self._waiting) - 1} more tasks"
            " are waiting. Allow more connections (APITASK_MAIL_CONNECTIONS), or send"
            " less mail at once."
        )

    def _wake_next(self) -> None:
        if self._waiting:
            self._waiting[0].notify()

    def narrow(self, session: SMTPSession, *, certain: bool, scarce: bool) -> bool:
        """Do without this connection from now on, if others work.

        :param certain: The refusal was about the connection. If that is in doubt, even
            a connection being opened counts as working: it may be within the limit.
        :param scarce: Keep no connection for long, even if no others work, because
            other processes need them too.
        """
        with reaper.lock:
            others = self._in_use - {session}
            working = [other for other in others if other.let_in or not certain]
            count = len(working) + len(self._idle)
            # A server that lets nobody in has another problem than a limit.
            self._limit = min(self._limit, count) or self.size

            if count or scarce:
                self._try_more_at = time.monotonic() + _TRY_MORE_AFTER

            self._wake_next()
            return count > 0

    def widen(self) -> None:
        """Undo :meth:`narrow`: there was no limit."""
        with reaper.lock:
            self._limit, self._try_more_at = self.size, 0.0
            self._wake_next()

    def opens_others(self, session: SMTPSession) -> bool:
        """Tell whether other connections are being opened or are open."""
        with reaper.lock:
            others = self._in_use - {session}
            # Until connect() returns, a session has no socket, but the server may
            # already count it.
            return any(other.opening or other.sock for other in others)

    def tell(self, cause: int | str, stage: str) -> None:
        """Log a server's limit, once per owner, and the reply that showed it."""
        with reaper.lock:
            told = _told.setdefault(self._owner() or self, set())
            is_known = str(self.settings) in told
            told.add(str(self.settings))

        if not is_known:
            log(logger, logging.INFO, _LIMIT, self.size, self.settings, cause, stage)

    def release(self, session: SMTPSession) -> None:
        """Give a session back, and keep its connection if it may be wanted."""
        kept = False

        # Whatever happens here, such as a Ctrl-C, the place must not be lost.
        try:
            kept = session.usable() and self._keep(session)
        finally:
            if not kept:
                self._discard([session])

    def _keep(self, session: SMTPSession) -> bool:
        with reaper.lock:
            wanted = self.keepalive or self._waiting

            # A session taken before a fork has no place in the child's pool.
            if reaper.exiting or not wanted or session not in self._in_use:
                return False

            now = time.monotonic()
            scarce = _SHORTLY if self._try_more_at > now else math.inf
            closes_at = now + min(self.keepalive or _SHORTLY, scarce)
            reaper.watch(self, closes_at)
            self._free(session)
            sooner = [(min(due, closes_at), idle) for due, idle in self._idle]
            self._idle = collections.deque([*sooner, (closes_at, session)])
            return True

    def _discard(self, sessions: list[SMTPSession], until: float | None = None) -> None:
        try:
            end_all(sessions, until)
        finally:
            with reaper.lock:
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
        """Close idle connections. The exit of the interpreter does so by itself.

        :param until: Close those due by this time of the monotonic clock.
        :param deadline: When to stop waiting for the server; after 1 s by default.
        """
        due: list[SMTPSession] = []

        with reaper.lock:
            if self._owner() is None:
                until = math.inf

            while self._idle and self._idle[0][0] <= until:
                due.append(self._idle.popleft()[1])

            self._in_use.update(due)

        self._discard(due, deadline)

        if until == math.inf:
            reaper.wake()

    @property
    def closes_at(self) -> float:
        """When the next idle connection is to be closed; infinity if none is idle."""
        return self._idle[0][0] if self._idle else math.inf

    def __repr__(self) -> str:
        return (
            f"<ConnectionPool '{self.settings.host}:{self.settings.port}'"
            f" size={self.size} in_use={len(self._in_use)} idle={len(self._idle)}"
            f" waiting={len(self._waiting)}>"
        )


def find_pool(pools: Pools, settings: SMTPSettings, **options: t.Any) -> ConnectionPool:
    """Return the pool for these settings, or make one with these options."""
    with reaper.lock:
        pool = pools.get(settings)
        return pool or pools.setdefault(settings, ConnectionPool(settings, **options))


def _after_fork() -> None:
    """In a forked child, leave the connections to the parent process."""
    for pool in list(_pools):
        for session in [*pool._in_use, *(session for _, session in pool._idle)]:
            session.close()

        pool.reset()


# Not every system has fork().
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork)
