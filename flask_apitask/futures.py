from __future__ import annotations

import concurrent.futures
import logging
import threading
import typing as t
from concurrent.futures._base import PENDING

T = t.TypeVar("T")

_logger = logging.getLogger(__name__)

# A lock's class, whatever function makes one: gevent has another in its place. If that
# comes after this import, the native one stays, and serves as well.
_RLock: t.Any = type(threading.RLock())


class _LateCondition(_RLock):  # type: ignore[misc]
    """A condition variable that is no more than its lock until a thread waits.

    A future needs none that is read when its scope has been waited for.
    """

    # Guarded by the lock, as is all that calls the two methods that need it.
    _condition: threading.Condition | None = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as :meth:`threading.Condition.wait` does. Needs the lock."""
        if self._condition is None:
            self._condition = threading.Condition(self)

        return self._condition.wait(timeout)

    def notify_all(self) -> None:
        """Wake those that wait. Needs the lock."""
        if self._condition is not None:
            self._condition.notify_all()
            # It refers to this. Who wakes has it, and nobody waits after the outcome.
            del self._condition


class TaskFuture(concurrent.futures.Future[T]):
    """A standard future that makes its condition variable only if a thread waits.

    Its methods are the standard library's, as are :func:`concurrent.futures.wait` and
    what else works with one. Its attributes are set here, and not by that class's own
    ``__init__``, which makes one for each.
    """

    def __init__(self) -> None:
        self._condition: t.Any = _LateCondition()
        self._state = PENDING
        self._result = None
        self._exception = None
        self._waiters: list[t.Any] = []
        self._done_callbacks: list[t.Any] = []

    def _invoke_callbacks(self) -> None:
        """Call the callbacks. One that raises holds up nobody.

        The standard library logs an :exc:`Exception`, and lets all else through.
        """
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException:
                _logger.exception("A callback of a task's future failed.")
