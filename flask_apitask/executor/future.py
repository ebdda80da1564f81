from __future__ import annotations

import concurrent.futures
import contextlib
import typing as t

from .task import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .queue import TaskQueue
    from .runner import How
    from .runner import Runner

T = t.TypeVar("T")
Callback: t.TypeAlias = "cabc.Callable[[concurrent.futures.Future[t.Any]], object]"
# A task, its arguments, and when it was submitted, in seconds of time.monotonic().
Work: t.TypeAlias = (
    "tuple[cabc.Callable[..., t.Any], tuple[t.Any, ...], dict[str, t.Any], float]"
)

_NO_WAIT: t.Final = contextlib.nullcontext()


class TaskFuture(concurrent.futures.Future[T]):
    """A standard future that holds its task until that has run.

    A scope queues these. When somebody waits for one, its scope gets a thread if it has
    none. In a coroutine, ``await`` waits without blocking the event loop.

    The task finds the context variables of the place where the future is made.

    :param runner: Calls the task, and the done callbacks.
    :param scope: Where the task is queued; ``None`` for one that was called at once.
    """

    # Its place among the tasks of its scope, from 1.
    index: int = 0
    # The identifier of the thread that runs the task, or its done callbacks.
    thread: int = 0
    # Whether its scope has put it off until something has happened.
    held: bool = False

    def __init__(
        self,
        runner: Runner,
        scope: TaskQueue | None = None,
        work: Work | None = None,
    ) -> None:
        # Not by super(), which takes a tenth of the time that this does.
        concurrent.futures.Future.__init__(self)
        self._runner = runner
        self._scope = scope
        self._work: t.Any = work
        self._context = runner.copy_context()

    def result(self, timeout: float | None = None) -> T:
        """Return what the task returns, or raise what it raises.

        :param timeout: Seconds to wait at most, ``None`` for as long as it takes.
        :raises TimeoutError: The task is not done by then. It goes on.
        :raises concurrent.futures.CancelledError: It never runs.
        :raises RuntimeError: It is put off, by :func:`.run_on_success` say.
        """
        try:
            with self._waiting():
                return super().result(timeout)
        finally:
            # What the task raised refers to this frame: no cycle through the future.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the task raises, or ``None``. It waits as :meth:`result` does."""
        with self._waiting():
            return super().exception(timeout)

    def add_done_callback(self, fn: Callback) -> None:
        """Have a function called with this future once the task is done.

        It runs where a task may run, and finds what a task finds: an app context of its
        own, and the task's request and context variables. What it raises is logged.
        """
        runner, context = self._runner, self._context
        super().add_done_callback(
            lambda future: context.copy().run(runner.call_back, fn, future)
        )

    def __await__(self) -> cabc.Generator[t.Any, None, T]:
        # Only a coroutine gets here, and asyncio takes long to import.
        import asyncio

        # Else it would have to wait until a thread calls it back.
        if self.cancelled():
            raise asyncio.CancelledError

        if self.done():
            return self.result()

        with self._waiting():
            return (yield from asyncio.wrap_future(self).__await__())

    def run(self, how: How) -> None:
        """Run the task, unless it was cancelled. For the scope, once.

        A waiting thread may go on as soon as the scope counts the task as done. By then
        nothing here refers to the task or its arguments any more.
        """
        run: t.Any = self._context.run

        if not self.set_running_or_notify_cancel():
            work, self._work, self._scope = self._work, None, None

            if work is not None:
                run(self._runner.drop, *work)

            return

        try:
            result = run(self._runner.run, *self._work, how)
        except BaseException as error:
            self._work = self._scope = None
            self.set_exception(error)
            self.thread = 0
            # The traceback refers to this frame: no cycle from it to the exception.
            del self
        else:
            self._work = self._scope = None
            self.set_result(result)
            # Another thread may have this identifier later on.
            self.thread = 0

    def drop(self, reason: str) -> None:
        """Cancel a task that was put off, and have the runner say why.

        :param reason: What has not come about, as part of a sentence.
        """
        work, self._work, self.held = self._work, None, False
        # Somebody may have cancelled it before.
        reasons = () if self.cancelled() else (reason,)
        self.cancel()
        # Those who wait for it are told.
        self.run("inline")
        run: t.Any = self._context.run
        run(self._runner.drop, *work, *reasons)

    @property
    def task(self) -> t.Any:
        """What is called, ``None`` once that is done."""
        work: Work | None = self._work
        return None if work is None else work[0]

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        if self.held:
            raise RuntimeError(
                f"Task {task_name(self.task)!r} is put off, and to wait for it here may"
                " be to wait for ever: it starts when its request has succeeded, or its"
                " session has committed. Use add_done_callback()."
            )

        scope = self._scope
        return _NO_WAIT if scope is None else scope.waiting()
