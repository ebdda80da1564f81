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

    from .runner import Work


P = t.ParamSpec("P")
T = t.TypeVar("T")


class TaskScope(HoldingQueue, concurrent.futures.Executor):
    """An executor that lives as long as one request or one block of code.

    It has its own queue, cap and end, and borrows its threads from a pool. Don't create
    one yourself: :func:`.open_scope` and :class:`.ApiTask` do. It works with everything
    that takes an executor or its futures, such as
    :meth:`asyncio.loop.run_in_executor` and :func:`concurrent.futures.wait`.

    1.  Once :meth:`submit` has returned, the task runs exactly once, unless its future
        is cancelled, or the scope is shut down with ``cancel_futures`` or ends at a
        deadline.
    2.  Tasks begin in the order of their submission, at most ``max_workers`` at once.
    3.  No task runs on a thread that submits it or waits for it, unless no thread can
        be started at all. Then it runs there, in order, and a warning says so.
    4.  When a thread waits for a scope, the scope gets a thread, if need be one beyond
        the pool's size; at most one extra for each thread that waits.
    5.  After a wait, the scope keeps no reference to the arguments of its tasks.

    A task must not wait for a later one of its scope. A signal handler or finalizer
    must not submit, because it may interrupt a thread that holds the lock.

    :param timeout: Maximum seconds that :meth:`end` waits; ``None`` waits indefinitely.
    """

    @property
    def closed(self) -> bool:
        """Whether new tasks are refused. In a forked child they always are."""
        return self._closed or self._forked

    def submit(
        self, fn: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskFuture[T]:
        """Run a task on a thread of the pool, with the caller's context variables.

        :param fn: A callable. All further arguments are its own.
        :raises TypeError: ``fn`` can't be called, or is the class of a :class:`.Task`.
        :raises ScopeClosed: The scope has ended. :func:`.run` makes a plain call
            instead.
        """
        task: t.Any = fn

        if not callable(task) or isinstance(task, type):
            task = make_callable(task)

        if self._generation != self._pool.generation:
            raise _refusal(task)

        work = task, args, kwargs, time.monotonic()
        future: TaskFuture[T] = TaskFuture(self.runner, self, work)

        with self._lock:
            if self._closed:
                raise _refusal(task)

            needed = self._add(future)

        try:
            if needed:
                self._request_threads(needed)

            return future
        finally:
            # The traceback of a task that failed inline refers to this frame: avoid a
            # reference cycle.
            del future

    def call_back(self, fn: cabc.Callable[..., object], *args: t.Any) -> bool:
        """Call a function on a thread of the pool; the scope waits for it too.

        The caller may wait for the function in its own way, so this call counts as a
        thread that waits.

        :return: ``False`` if the scope has ended, so the function is not called.
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
        """Block until the tasks submitted so far have ended, in whatever way.

        :param timeout: Maximum seconds to wait; ``None`` waits indefinitely.
        :raises TimeoutError: Some tasks are not done yet. They keep running, and the
            scope stays open.
        """
        unfinished = 0 if self._forked else self._join(timeout)

        if unfinished:
            raise TimeoutError(
                f"{unfinished} of the scope's tasks were not done after {timeout} s."
            )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse new tasks, and wait for those submitted, without a deadline.

        A request's scope is ended for you; call this to end it early. Calling it twice
        is harmless.

        :param wait: Block until the tasks are done.
        :param cancel_futures: Cancel the tasks that no thread has begun.
        """
        if self._forked:
            return

        with self._lock:
            self._closed = True

        if cancel_futures:
            self._cancel_queued()
            self.drop("its scope was shut down", *self._find_held(True, False))

        if wait:
            self._join(None)

        self._drop_requests()

    def end(self) -> BaseException | None:
        """Refuse new tasks, and wait until the deadline for those submitted.

        The runner reports the tasks that are left behind.

        :return: The exception that the runner kept to be raised, if any; only once.
        """
        if not self._forked:
            with self._lock:
                self._closed = True

            # A fast path: most scopes hold no deferred tasks.
            if self._held:
                held = self._find_held(False)
                self.drop("its scope ended before the commit", *held)

            if self._join(self._timeout) and self._timeout is not None:
                self._give_up(self._timeout)

            self._drop_requests()

        raised, self.runner.raised = self.runner.raised, None
        return raised

    def _give_up(self, timeout: float) -> None:
        """Cancel queued tasks, replace the threads of running ones, and report both."""
        cancelled = self._cancel_queued()

        with self._lock:
            running = list(self._running)

        overdue = find_overdue(running, timeout)
        abandoned = self._pool.abandon(self, overdue)

        try:
            self._pool.replace_abandoned()
        finally:
            # Even after an interrupt: ending the scope again would find nothing to
            # report.
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
        f"Task {task_name(fn)!r} was submitted to a scope that has ended. Submit it"
        " before the request or the 'with' block ends, or use run(), which then calls"
        " the task on the spot."
    )
