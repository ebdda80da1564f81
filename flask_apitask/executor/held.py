from __future__ import annotations

import time
import typing as t

from .future import TaskFuture
from .queue import TaskQueue
from .task import make_callable

if t.TYPE_CHECKING:
    from .pool import ThreadPool
    from .runner import Runner


class HoldingQueue(TaskQueue):
    """A queue with tasks beside it that are put off until something has happened.

    Tasks that wait for the success of the scope are started or dropped together, by
    :meth:`settle`. The others, which wait for a commit, have their own :meth:`start`
    and :meth:`drop`, and are dropped at the end of the scope.

    What could break it, and what prevents it: a task is held just when the scope is
    settled, or is started just when the scope ends. So a task is held, and goes from
    there to the queue, in one step each, under the lock of the queue.
    """

    def __init__(
        self,
        pool: ThreadPool,
        max_workers: int,
        timeout: float | None = None,
        runner: Runner | None = None,
    ) -> None:
        TaskQueue.__init__(self, pool, max_workers, timeout, runner)
        # What is put off, and whether it waits for the success of the scope.
        self._held: dict[TaskFuture[t.Any], bool] = {}
        self._settled = False
        self._failure: str | None = None

    @property
    def awaits_success(self) -> bool:
        """Whether there are tasks that wait for the success of the scope."""
        return any(tuple(self._held.values()))

    def hold(
        self,
        task: t.Any,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        *,
        for_success: bool,
    ) -> TaskFuture[t.Any] | None:
        """Put a task off, or drop it if the scope has failed already.

        :return: ``None`` if there is nothing to wait for any more.
        """
        task = make_callable(task)

        if self._forked:
            return None

        work = task, args, kwargs, time.monotonic()
        future: TaskFuture[t.Any] = TaskFuture(self._runner, self, work)

        with self._lock:
            settled, failure = for_success and self._settled, self._failure

            if not settled and (for_success or not self._closed):
                future.held = True
                self._held[future] = for_success
                return future

        if settled and failure is not None:
            future.drop(failure)
            return future

        return None

    def settle(self, failure: str | None) -> None:
        """Start the tasks that wait for the success, or drop them. Idempotent.

        :param failure: Why there is no success, as part of a sentence.
        """
        if self._forked:
            return

        with self._lock:
            if not self._settled:
                self._settled, self._failure = True, failure

            # Most scopes hold nothing, and each is settled.
            futures = self._held and [
                future for future, success in self._held.items() if success
            ]

        if not futures:
            return

        if self._failure is None:
            self.start(*futures)
        else:
            self.drop(self._failure, *futures)

    def start(self, *futures: TaskFuture[t.Any]) -> None:
        """Queue those of the tasks that are still held."""
        if self._forked:
            return

        lacking = 0

        with self._lock:
            for future in futures:
                if self._held.pop(future, None) is not None:
                    future.held = False
                    lacking += self._add(future)

        self._request_threads(lacking)

    def drop(self, reason: str, *futures: TaskFuture[t.Any]) -> None:
        """Cancel those of the tasks that are still held."""
        if self._forked:
            return

        with self._lock:
            held = [
                future for future in futures if self._held.pop(future, None) is not None
            ]

        for future in held:
            future.drop(reason)

    def _drop_all(self, reason: str, *, for_success: bool) -> None:
        """Refuse further tasks, and drop what waits for a commit, or for anything."""
        if self._forked:
            return

        with self._lock:
            self._closed = True
            held = self._held and [
                future
                for future, is_for_success in self._held.items()
                if for_success or not is_for_success
            ]

        if held:
            self.drop(reason, *held)
