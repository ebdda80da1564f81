from __future__ import annotations

import contextvars
import time
import traceback
import typing as t
import warnings

from .futures import TaskFuture
from .tasks import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc
    from types import FrameType

    from .threads import How

T = t.TypeVar("T")

_NO_STACK = "  (no stack: it runs on no thread of the system)\n"


class Overdue(t.NamedTuple):
    """What a scope left behind when it ended at its deadline.

    :param timeout: Seconds that it waited.
    :param cancelled: The names of tasks that no thread had begun. They never run.
    :param running: The names of tasks that still run, each with the stack, as text,
        that its thread was in.
    :param held: How many threads of the pool are held by such tasks now, of any scope.
    """

    timeout: float
    cancelled: list[str]
    running: list[tuple[str, str]]
    held: int


class Binding(t.Protocol):
    """What the tasks of a scope find around them."""

    def call(self, job: Job[T], how: How) -> T:
        """Call a job's task; called in the job's context."""

    def report(self, overdue: Overdue) -> None:
        """Tell what a scope left behind; called in the thread that has waited."""


class Job(t.Generic[T]):
    """A task, its arguments and its future: what a scope queues, and runs once.

    Made by who submits it, whose context variables the task finds.

    :param task: A callable.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    """

    __slots__ = (
        "args",
        "context",
        "future",
        "index",
        "kwargs",
        "submitted",
        "task",
        "thread",
    )

    def __init__(
        self,
        task: t.Any,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
    ) -> None:
        self.task: t.Any = task
        self.args: tuple[t.Any, ...] = args
        self.kwargs: dict[str, t.Any] = kwargs
        self.context: contextvars.Context = contextvars.copy_context()
        # Seconds of the monotonic clock.
        self.submitted: float = time.monotonic()
        self.future: TaskFuture[T] = TaskFuture()
        # Its place among those submitted to its scope, from 1.
        self.index: int = 0
        # Of the thread that runs it.
        self.thread: int = 0

    def run(self, how: How, binding: Binding) -> None:
        """Run the task, unless its future is cancelled.

        Who waits may go on as soon as the scope counts the job as done. By then nothing
        here refers to the task, its arguments or its outcome any more.
        """
        future = self.future

        if not future.set_running_or_notify_cancel():
            del self.task, self.args, self.kwargs, self.context, self.future
            return

        try:
            result = self.context.run(binding.call, self, how)
        except BaseException as error:
            del self.task, self.args, self.kwargs, self.context, self.future
            future.set_exception(error)
            # The traceback refers to this frame: no cycle from it to the exception.
            del future
        else:
            del self.task, self.args, self.kwargs, self.context, self.future
            future.set_result(result)

    def describe(self, frames: cabc.Mapping[int, FrameType]) -> tuple[str, str] | None:
        """Return the task's name and its stack in a snapshot, unless it is done."""
        frame = frames.get(self.thread)
        stack = "".join(traceback.format_stack(frame)) if frame else _NO_STACK
        task = getattr(self, "task", None)
        return None if task is None else (task_name(task), stack)


class Unbound:
    """A :class:`Binding` that does nothing around a task, and has no log."""

    def call(self, job: Job[T], how: How) -> T:
        result: T = job.task(*job.args, **job.kwargs)
        return result

    def report(self, overdue: Overdue) -> None:
        warnings.warn(f"A scope left tasks behind: {overdue}", stacklevel=3)


UNBOUND: t.Final = Unbound()
