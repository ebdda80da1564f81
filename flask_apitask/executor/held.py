from __future__ import annotations

import time
import typing as t

from .future import TaskFuture
from .queue import TaskQueue
from .task import make_callable


class HoldingQueue(TaskQueue):
    """A queue that also holds deferred tasks until something has happened.

    Tasks that wait for the success of the scope are started or dropped together, by
    :meth:`settle`. The others wait for a commit: they leave one by one, by
    :meth:`start`, :meth:`let_go` or :meth:`drop`, and the end of the scope drops the
    rest.

    What could break it, and what prevents it: a task is held while the scope is being
    settled, or started while the scope is ending. So holding a task is one step under
    the lock of the queue, and moving it to the queue is another.
    """

    # The deferred tasks, and whether each waits for the success of the scope. Most
    # scopes have none.
    _held: dict[TaskFuture[t.Any], bool] | None = None
    _settled: bool = False
    _failure: str | None = None

    @property
    def awaits_success(self) -> bool:
        """Whether there are tasks that wait for the success of the scope."""
        return bool(self._find_held(True))

    def hold(
        self,
        task: t.Any,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        *,
        for_success: bool,
    ) -> TaskFuture[t.Any] | None:
        """Defer a task, or drop it if the scope has already failed.

        :return: ``None`` if the scope can't hold the task: it has already succeeded or
            ended, or this is a forked child.
        """
        task = make_callable(task)

        if self._forked:
            return None

        work = task, args, kwargs, time.monotonic()
        future: TaskFuture[t.Any] = TaskFuture(self.runner, self, work)

        with self._lock:
            settled, failure = for_success and self._settled, self._failure

            if not settled and (for_success or not self._closed):
                future.held = True
                self._held = self._held or {}
                self._held[future] = for_success
                return future

        if settled and failure is not None:
            future.drop(failure)
            return future

        return None

    def settle(self, failure: str | None) -> bool:
        """Start the tasks that wait for the scope's success, or drop them. Idempotent.

        :param failure: Why there is no success, as a clause, or ``None``.
        :return: Whether any were started.
        """
        if self._forked:
            return False

        with self._lock:
            if not self._settled:
                self._settled, self._failure = True, failure

        # A fast path: most scopes hold no deferred tasks.
        if not self._held:
            return False

        futures = self._find_held(True)

        if self._failure is not None:
            self.drop(self._failure, *futures)
            return False

        self.start(*futures)
        return bool(futures)

    def start(self, *futures: TaskFuture[t.Any]) -> None:
        """Queue those of the given tasks that are still held."""
        if self._forked:
            return

        needed = 0

        with self._lock:
            for future in futures:
                if self._take_held(future):
                    future.held = False
                    needed = max(needed, self._add(future))

        self._request_threads(needed)

    def let_go(self, future: TaskFuture[t.Any]) -> bool:
        """Stop holding a task, for the caller to run it; return whether it was held."""
        if self._forked:
            return False

        with self._lock:
            return self._take_held(future)

    def drop(self, reason: str, *futures: TaskFuture[t.Any]) -> None:
        """Cancel those of the given tasks that are still held."""
        if self._forked:
            return

        with self._lock:
            held = [future for future in futures if self._take_held(future)]

        for future in held:
            future.drop(reason)

    def _find_held(self, *for_success: bool) -> list[TaskFuture[t.Any]]:
        """Return the tasks that wait for the scope's success, or for a commit.

        :param for_success: Which of the two, or both.
        """
        with self._lock:
            held = (self._held or {}).items()
            return [future for future, success in held if success in for_success]

    def _take_held(self, future: TaskFuture[t.Any]) -> bool:
        """Release a task; return whether it was held. Needs the lock."""
        return self._held is not None and self._held.pop(future, None) is not None
