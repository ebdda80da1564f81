from __future__ import annotations

import threading


class Barrier:
    """A thread that waits for tasks sleeps on this. Guarded by the scope's lock.

    :param last: The index of the last task to wait for.
    :param remaining: How many of the tasks are not done.
    """

    __slots__ = ("last", "lock", "remaining")

    def __init__(self, last: int, remaining: int) -> None:
        self.last: int = last
        self.remaining: int = remaining
        # Held until no task remains.
        self.lock: threading.Lock = threading.Lock()
        self.lock.acquire()

    def sleep(self, timeout: float | None) -> None:
        """Sleep until no task remains. Called without the scope's lock."""
        if self.remaining:
            limit = -1 if timeout is None else max(0, timeout)
            self.lock.acquire(timeout=min(limit, threading.TIMEOUT_MAX))
