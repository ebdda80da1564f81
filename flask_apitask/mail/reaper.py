from __future__ import annotations

import atexit
import contextlib
import contextvars
import math
import os
import queue
import threading
import time
import typing as t

if t.TYPE_CHECKING:
    from .pool import ConnectionPool


class Reaper:
    """Closes idle connections in time, on one thread for all pools of the process.

    The thread is started for the first idle connection. It ends when it wakes and no
    connection is idle any more.
    """

    def __init__(self) -> None:
        self.exiting = False
        self.reset()

    def reset(self) -> None:
        """Start afresh in a forked child: the thread is gone, the lock may be held."""
        # Guards everything here and the state of all pools. It is held for list
        # operations and to start a thread, never during I/O.
        self.lock = threading.Lock()
        # The pools with idle connections. Only this set keeps them alive.
        self.pools: set[ConnectionPool] = set()
        self.thread: threading.Thread | None = None
        self._wakes_at = 0.0
        # The thread sleeps on this queue. Even code run by the garbage collector may
        # write to it.
        self._alarm: queue.SimpleQueue[None] = queue.SimpleQueue()

    def watch(self, pool: ConnectionPool, closes_at: float) -> None:
        """Make sure that a pool's idle connection is closed in time. Needs the lock."""
        self.pools.add(pool)

        if self.thread is None:
            # A non-daemon thread would keep the interpreter from exiting for the
            # keepalive.
            name = "apitask-mail-reaper"
            thread = threading.Thread(
                target=self._run, args=[closes_at], name=name, daemon=True
            )
            # A new queue, as the old one may hold alarms that nobody has heard.
            self._wakes_at, self._alarm = closes_at, queue.SimpleQueue()

            # If no thread can be started, the next connection given back tries again.
            with contextlib.suppress(RuntimeError):
                # In an empty context, so that it keeps nothing of the request alive.
                contextvars.Context().run(thread.start)
                self.thread = thread
        elif closes_at < self._wakes_at:
            self.wake()

    def wake(self, _: object = None) -> None:
        """Have the thread look at all pools again."""
        self._alarm.put(None)

    def end(self) -> None:
        """Close all idle connections and keep no more of them: the process exits."""
        with self.lock:
            self.exiting = True

        self._close_due(math.inf)

    def _run(self, wakes_at: float) -> None:
        # It sleeps first: the connection that it was started for may be in use again.
        while wakes_at < math.inf:
            with contextlib.suppress(queue.Empty):
                self._alarm.get(timeout=max(0, wakes_at - time.monotonic()))

            wakes_at = self._close_due(time.monotonic())

    def _close_due(self, until: float) -> float:
        """Close the connections due by a time; return when the next one is due."""
        deadline = time.monotonic() + 1

        with self.lock:
            pools = list(self.pools)

        for pool in pools:
            pool.close_idle(until, deadline)

        with self.lock:
            self.pools = {pool for pool in self.pools if pool.closes_at < math.inf}
            self._wakes_at = min((p.closes_at for p in self.pools), default=math.inf)

            if not self.pools:
                # Under the same lock, so that no connection given back now relies on
                # this thread.
                self.thread = None

            return self._wakes_at


reaper = Reaper()
atexit.register(reaper.end)
# Not every system has fork().
getattr(os, "register_at_fork", dict)(after_in_child=reaper.reset)
