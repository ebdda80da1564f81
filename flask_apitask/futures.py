from __future__ import annotations

import concurrent.futures
import threading
import typing as t
from concurrent.futures._base import PENDING

T = t.TypeVar("T")


class _LateCondition:
    """A condition variable that is no more than its lock until a thread waits.

    A future needs none that is read when its scope has been waited for.
    """

    __slots__ = ("_condition", "_lock")

    def __init__(self) -> None:
        # What gevent puts in its place is found at run time only.
        self._lock = threading.RLock()
        # Guarded by the lock, as is all that calls the two methods that need it.
        self._condition: threading.Condition | None = None

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *exc_info: t.Any) -> None:
        self._lock.__exit__(*exc_info)

    def acquire(self) -> None:
        self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as :meth:`threading.Condition.wait` does. Needs the lock."""
        if self._condition is None:
            self._condition = threading.Condition(self._lock)

        return self._condition.wait(timeout)

    def notify_all(self) -> None:
        """Wake those that wait. Needs the lock."""
        if self._condition is not None:
            self._condition.notify_all()


class TaskFuture(concurrent.futures.Future[T]):
    """A standard future that makes its condition variable only if a thread waits.

    All its methods are the standard library's, as are :func:`concurrent.futures.wait`
    and what else works with one. Only its attributes are set here, and not by that
    class's own ``__init__``, which makes one for each.
    """

    def __init__(self) -> None:
        self._condition: t.Any = _LateCondition()
        self._state = PENDING
        self._result = None
        self._exception = None
        self._waiters: list[t.Any] = []
        self._done_callbacks: list[t.Any] = []
