from __future__ import annotations

import concurrent.futures
import time
import typing as t
import warnings

from .exceptions import ScopeClosed
from .future import TaskFuture
from .held import HoldingQueue
from .overdue import find_overdue
from .runner import Runner
from .runner import TimeoutReport
from .task import make_callable
from .task import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .future import Work


P = t.ParamSpec("P")
T = t.TypeVar("T")


class TaskScope(HoldingQueue, concurrent.futures.Executor):
    """An executor with the lifetime of one request, or of one block of code.

    It has a queue, a cap and an end of its own, and borrows the threads that it runs
    on. :func:`.open_scope` and :class:`.ApiTask` make one; don't make one yourself.
    What takes an executor works with it, such as :func:`concurrent.futures.wait` and
    :meth:`asyncio.loop.run_in_executor`.

    1.  A task whose :meth:`submit` returned runs exactly once, unless its future is
        cancelled, the scope is shut down with ``cancel_futures`` or ends at a deadline.
    2.  Tasks begin in the order of their submission, ``max_workers`` at once at most.
    3.  No task runs on the thread that submits it or waits for it, unless the system
        gives no thread at all. Then it runs there, in order, and a warning says so.
    4.  A scope that is waited for gets a thread, if need be one beyond the pool's size,
        and at most one for each thread that waits.
    5.  When a wait is over, nothing in here refers to the arguments of its tasks.

    No task may wait for a later one of its scope. No signal handler or finalizer may
    submit: it may interrupt a thread that holds the lock.

    :param timeout: Seconds that :meth:`end` waits, ``None`` for as long as it takes.
    """

    @property
    def closed(self) -> bool:
        """Whether further tasks are refused. In a forked child they always are."""
        return self._closed or self._forked

    def submit(
        self, fn: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskFuture[T]:
        """Run a task on a thread of the pool, in the Flask context of the caller.

        :param fn: A callable. Every argument after it belongs to it.
        :raises TypeError: ``fn`` can't be called.
        :raises ScopeClosed: The scope has ended. :func:`.run` makes a plain call then.
        """
        task: t.Any = fn

        if not callable(task):
            task = make_callable(task)

        if self._generation != self._pool.generation:
            raise _refusal(task)

        work = task, args, kwargs, time.monotonic()
        future: TaskFuture[T] = TaskFuture(self.runner, self, work)

        with self._lock:
            if self._closed:
                raise _refusal(task)

            lacking = self._add(future)

        try:
            if lacking:
                self._request_threads(lacking)

            return future
        finally:
            # The traceback of what failed inline refers to this frame: no cycle.
            del future

    def call_back(self, fn: cabc.Callable[..., object], *args: t.Any) -> bool:
        """Call a function on a thread of the pool, and wait for it as for a task.

        Whoever asks for that may wait for it, in ways of its own. So this counts as a
        thread that waits.

        :return: ``False`` if the scope has ended, and nothing is called.
        """
        work: Work = self._call_back, (fn, *args), {}, time.monotonic()
        future: TaskFuture[None] = TaskFuture(Runner(), self, work)
        return not self._forked and self._wait_for(future)

    def _call_back(self, fn: cabc.Callable[..., object], *args: t.Any) -> None:
        try:
            fn(*args)
        finally:
            self._stop_waiting()

    def wait(self, timeout: float | None = None) -> None:
        """Block until the tasks submitted so far are done, however they end.

        :param timeout: Seconds to wait at most, ``None`` for as long as it takes.
        :raises TimeoutError: Some are not done yet. They go on, and so does the scope.
        """
        unfinished = 0 if self._forked else self._join(timeout)

        if unfinished:
            raise TimeoutError(
                f"{unfinished} of the scope's tasks were not done after {timeout} s."
            )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse further tasks, and wait for those submitted, without a deadline.

        A request's scope is ended for you; call this to end it early. Doing it twice
        is harmless.

        :param wait: Block until the tasks are done.
        :param cancel_futures: Cancel those that no thread has begun.
        """
        if self._forked:
            return

        with self._lock:
            self._closed = True

        if cancel_futures:
            self._cancel_queued()
            self._drop_held("its scope was shut down", for_success=True)

        if wait:
            self._join(None)

        self._drop_requests()

    def end(self) -> BaseException | None:
        """Refuse further tasks, and wait for those submitted until the deadline.

        The runner reports what is left behind then.

        :return: What the runner would have raised, if anything, and once only.
        """
        if not self._forked:
            with self._lock:
                self._closed = True

            # Most scopes hold nothing.
            if self._held:
                reason = "its scope ended before the commit"
                self._drop_held(reason, for_success=False)

            if self._join(self._timeout) and self._timeout is not None:
                self._give_up(self._timeout)

            self._drop_requests()

        raised, self.runner.raised = self.runner.raised, None
        return raised

    def _give_up(self, timeout: float) -> None:
        """Cancel what is queued, have what runs replaced, and report both."""
        cancelled = self._cancel_queued()

        with self._lock:
            running = list(self._running)

        overdue = find_overdue(running, timeout)
        abandoned = self._pool.abandon(self, overdue)

        try:
            self._pool.replace_abandoned()
        finally:
            # Whoever is interrupted and ends it again finds nothing to report.
            if cancelled or overdue:
                stacks = [(task.name, task.stack) for task in overdue]
                report = TimeoutReport(timeout, cancelled, stacks, abandoned)
                self.runner.report(report)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<{type(self).__name__} {state} queued={len(self._queue)}"
            f" running={len(self._running)} max_workers={self._max_workers}>"
        )

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._submitted and not self.closed:
            warnings.warn(
                f"{self!r} was never ended. Use 'with open_scope()'.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


def _refusal(fn: object) -> ScopeClosed:
    return ScopeClosed(
        f"Task {task_name(fn)!r} was submitted to a scope that has ended. Submit"
        " before the end of the request or of the 'with' block, or use run(), which"
        " then calls the task on the spot."
    )
