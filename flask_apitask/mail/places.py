from __future__ import annotations

import collections
import contextlib
import os
import queue
import threading
import time
import typing as t

from ..exceptions import DeliveryError

if t.TYPE_CHECKING:
    from .envelope import Server
    from .smtp import Connection


# Seconds for close() to say QUIT on all idle connections, about.
_CLOSE_TIMEOUT = 1.0


class _Waiter:
    """One who stands in line for a connection."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.connection: Connection | None = None
        self.refused = False


# Guarantees
#
# -   At most ``size`` connections are open at once, those that are being closed too.
# -   Who waits longest is served first, and nobody overtakes.
# -   A connection is used by one thread at a time, and by the process that opened it.
# -   An idle connection is closed within ``keepalive`` seconds, if its server answers
#     QUIT at once; no thread, socket or waiter is left when close() has returned, but
#     for what leases hold, and that is closed as they end.
# -   The lock is held for list operations and to start a thread, never for I/O.
#
# Assumptions
#
# -   dict.setdefault(), dict.pop() and set.add() are atomic, as CPython documents.
# -   SimpleQueue.put() may be called anywhere, a destructor included, as it documents.
# -   time.monotonic() is the same clock for all threads.
#
# Races, and what prevents them
#
# 1.  The closer finds nothing idle and is about to end; a lease returns a connection
#     and sees a closer. It would stay open. So the closer takes its name away
#     under the lock in which it finds nothing, and the lease starts another one.
# 2.  A waiter times out while it is being served. The place would be lost. So a waiter
#     that is no longer in line has been served, whatever its event said.
# 3.  close() empties the idle list; a lease returns a connection right after. It would
#     stay open. So the place to return it to says under the lock that it is closed.
# 4.  A thread forks while another one holds the lock, which nobody in the child will
#     release. So the child never touches the places of its parent: it has its own.


class Places:
    """What one process has open and who waits for it."""

    def __init__(self, size: int, keepalive: float) -> None:
        self.pid = os.getpid()
        self.size = size
        self.keepalive = keepalive
        # Everything open, in use and idle, for drop().
        self.connections: set[Connection] = set()
        # Wakes the closer before its time.
        self.alarm: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Guards all of the following.
        self.lock = threading.Lock()
        # Places taken: in_use + len(idle) <= size, and nobody waits below that.
        self.in_use = 0
        # With the time at which each is to be closed, soonest first.
        self.idle: list[tuple[float, Connection]] = []
        self.waiting: collections.deque[_Waiter] = collections.deque()
        self.closer: threading.Thread | None = None
        self.closed = False

    def __str__(self) -> str:
        return (
            f"in_use={self.in_use} idle={len(self.idle)} waiting={len(self.waiting)}"
            f"{' closed' if self.closed else ''}"
        )

    def take(self, server: Server) -> Connection | None:
        """Take a place, and the connection used last if one is idle."""
        with self.lock:
            if self.closed:
                raise _closed(server)

            if self.in_use < self.size:
                self.in_use += 1
                return self.idle.pop()[1] if self.idle else None

            waiter = _Waiter()
            self.waiting.append(waiter)

        try:
            waiter.called.wait(server.timeout)
        except BaseException:
            if not self._leave(waiter) and not waiter.refused:
                self.give_back(waiter.connection)

            raise

        if self._leave(waiter):
            raise DeliveryError(
                f"No connection to {server} was free within {server.timeout:g} s: all"
                f" {self.size} are in use and {len(self.waiting)} more wait. Allow"
                " more connections, or send less at once."
            )

        if waiter.refused:
            raise _closed(server)

        return waiter.connection

    def give_back(self, connection: Connection | None) -> None:
        """Give a place back, with the connection that is to be kept in it."""
        if connection is None or self._keep(connection):
            kept = connection
        else:
            self.discard(connection)
            kept = None

        if kept is None:
            with self.lock:
                if not self._serve_next(None):
                    self.in_use -= 1

    def discard(self, connection: Connection) -> None:
        """Close a connection whose place is taken still."""
        connection.end()
        self.connections.discard(connection)

    def close(self) -> None:
        """Close what is idle and refuse what waits."""
        with self.lock:
            self.closed = True
            idle = [connection for _, connection in self.idle]
            self.idle.clear()
            self.in_use += len(idle)
            closer = self.closer

            while self.waiting:
                waiter = self.waiting.popleft()
                waiter.refused = True
                waiter.called.set()

        # For all QUITs together: a stopping server has little time.
        deadline = time.monotonic() + _CLOSE_TIMEOUT

        for connection in idle:
            if time.monotonic() > deadline:
                connection.close()

            self.discard(connection)
            self.give_back(None)

        if closer is not None:
            self.alarm.put(None)
            closer.join()

    def drop(self) -> None:
        """Close all sockets without a word, without the lock and without waiting."""
        self.closed = True

        for connection in list(self.connections):
            connection.close()

    def _keep(self, connection: Connection) -> bool:
        with self.lock:
            if self.closed:
                return False

            if not self._serve_next(connection):
                self.in_use -= 1
                self.idle.append((time.monotonic() + self.keepalive, connection))

                if self.closer is None:
                    self._start_closer()

            return True

    def _serve_next(self, connection: Connection | None) -> bool:
        if not self.waiting:
            return False

        waiter = self.waiting.popleft()
        waiter.connection = connection
        waiter.called.set()
        return True

    def _leave(self, waiter: _Waiter) -> bool:
        """Step out of the line; ``False`` for one who was called before."""
        with self.lock:
            if waiter not in self.waiting:
                return False

            self.waiting.remove(waiter)
            return True

    def _start_closer(self) -> None:
        # A thread that is no daemon is joined before atexit functions run, and would
        # keep the interpreter for the length of keepalive. This one is joined by
        # close(), which is such a function, and so is never cut off either.
        self.closer = threading.Thread(
            target=self._close_expired, name="apitask-mail-closer", daemon=True
        )

        try:
            self.closer.start()
        except RuntimeError:
            # No thread can be had. The next connection that comes back tries again.
            self.closer = None

    def _close_expired(self) -> None:
        while True:
            with self.lock:
                if self.closed or not self.idle:
                    self.closer = None
                    return

                pause = self.idle[0][0] - time.monotonic()
                expired = self.idle.pop(0)[1] if pause <= 0 else None
                self.in_use += expired is not None

            if expired is not None:
                self.discard(expired)
                self.give_back(None)
            else:
                with contextlib.suppress(queue.Empty):
                    self.alarm.get(timeout=pause)


def _closed(server: Server) -> DeliveryError:
    return DeliveryError(f"The pool of connections to {server} is closed.")
