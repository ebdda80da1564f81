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
    from .runner import Work

T = t.TypeVar("T")
Callback: t.TypeAlias = "cabc.Callable[[concurrent.futures.Future[t.Any]], object]"

_NO_WAIT: t.Final = contextlib.nullcontext()


class TaskFuture(concurrent.futures.Future[T]):
    """A standard future that holds its task until the task has run.

    A scope queues these futures. When something waits for one, its scope gets a thread
    if it has none. In a coroutine, ``await`` waits without blocking the event loop.

    The task runs with the context variables of the code that made the future.

    :param runner: Calls the task and the done callbacks.
    :param scope: The scope that queues or holds the task, if one does.
    """

    # The position of the task among those of its scope, from 1.
    index: int = 0
    # The identifier of the thread that runs the task, or its done callbacks.
    thread: int = 0
    # Whether the task is deferred until a success or a commit.
    held: bool = False

    def __init__(
        self,
        runner: Runner,
        scope: TaskQueue | None = None,
        work: Work | None = None,
    ) -> None:
        # Not with super(), which would add a tenth to the time that this takes.
        concurrent.futures.Future.__init__(self)
        self._runner = runner
        self._scope = scope
        self._work: t.Any = work
        self._context = runner.copy_context()

    def result(self, timeout: float | None = None) -> T:
        """Return what the task returns, or raise what it raises.

        :param timeout: Maximum seconds to wait; ``None`` waits indefinitely.
        :raises TimeoutError: The task is not done by then. It keeps running.
        :raises concurrent.futures.CancelledError: The task will never run.
        :raises RuntimeError: The task is deferred, by :func:`.run_on_success` for
            example.
        """
        try:
            with self._waiting():
                return super().result(timeout)
        finally:
            # The traceback refers to this frame: avoid a cycle through the future.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the task raises, or ``None``. Waits like :meth:`result`."""
        with self._waiting():
            return super().exception(timeout)

    def add_done_callback(self, fn: Callback) -> None:
        """Call a function with this future once the task is done.

        It runs where a task may run, in its own app context, with the task's request
        and context variables. If it raises, that is logged.
        """
        runner, context = self._runner, self._context
        super().add_done_callback(
            lambda future: context.copy().run(runner.call_back, fn, future)
        )

    def __await__(self) -> cabc.Generator[t.Any, None, T]:
        # Only coroutines get here, and asyncio is slow to import.
        import asyncio

        # Not with wrap_future(self): before Python 3.13, a StopIteration gets lost on
        # the way, and the coroutine waits for ever.
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def tell(_: object) -> None:
            if done.set_running_or_notify_cancel():
                done.set_result(None)

        try:
            # Without this shortcut, it would wait until a thread calls back.
            if not self.done():
                with self._waiting():
                    super().add_done_callback(tell)
                    yield from asyncio.wrap_future(done).__await__()

            if self.cancelled():
                raise asyncio.CancelledError

            return self.result()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            # The traceback refers to this frame: avoid a cycle through the future.
            del self

    def run(self, how: How) -> None:
        """Run the task, unless it was cancelled. The scope calls this once.

        A waiting thread may go on as soon as the scope counts the task as done. By
        then, nothing here refers to the task or its arguments any more.
        """
        run: t.Any = self._context.run

        if not self.set_running_or_notify_cancel():
            self.thread = 0
            work, self._work, self._scope = self._work, None, None

            if work is not None:
                run(self._runner.drop, work)

            return

        try:
            result = run(self._runner.run, self._work, how)
        except BaseException as error:
            self._work = self._scope = None
            self.set_exception(error)
            self.thread = 0
            # The traceback refers to this frame: avoid a cycle through the future.
            del self
        else:
            self._work = self._scope = None
            self.set_result(result)
            # Another thread may get this identifier later.
            self.thread = 0

    def drop(self, reason: str) -> None:
        """Cancel a deferred task, and let the runner say why.

        :param reason: A clause, such as ``"the session was rolled back"``.
        """
        work, self._work, self.held = self._work, None, False
        # It may have been cancelled before.
        reasons = () if self.cancelled() else (reason,)
        self.cancel()
        # This notifies those that wait for the future.
        self.run("inline")
        run: t.Any = self._context.run
        run(self._runner.drop, work, *reasons)

    @property
    def task(self) -> t.Any:
        """The callable, ``None`` once it has run."""
        work: Work | None = self._work
        return None if work is None else work[0]

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        if self.held:
            raise RuntimeError(
                f"Task {task_name(self.task)!r} is deferred, so waiting for it here may"
                " never end: it starts once its request has succeeded, or its session"
                " has committed. Use add_done_callback() instead."
            )

        scope = self._scope
        return _NO_WAIT if scope is None else scope.waiting()
