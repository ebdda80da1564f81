from __future__ import annotations

import functools
import traceback
import typing as t

from .futures import TaskFuture
from .tasks import call_task
from .tasks import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc
    from types import FrameType

    from .threads import How

T = t.TypeVar("T")

# Calls a task that was bound to its arguments, and to whatever else it needs.
Call: t.TypeAlias = "cabc.Callable[[How], T]"
Binder: t.TypeAlias = (
    "cabc.Callable[[t.Any, tuple[t.Any, ...], dict[str, t.Any]], Call[t.Any]]"
)

_NO_STACK = "  (no stack: it runs on no thread of the system)\n"


class Job(t.Generic[T]):
    """A task and its future: what a scope queues, and runs once.

    :param task: A callable or a :class:`Task`.
    :param call: Calls it.
    """

    __slots__ = ("call", "future", "index", "task", "thread")

    def __init__(self, task: t.Any, call: Call[T]) -> None:
        self.task: t.Any = task
        self.call: Call[T] = call
        self.future: TaskFuture[T] = TaskFuture()
        # Its place among those submitted to its scope, from 1.
        self.index: int = 0
        # Of the thread that runs it.
        self.thread: int = 0

    def run(self, how: How) -> None:
        """Run the task, unless its future is cancelled.

        Who waits may go on as soon as the scope counts the job as done. By then nothing
        here refers to the task, its arguments or its outcome any more.
        """
        future = self.future

        if not future.set_running_or_notify_cancel():
            del self.task, self.call, self.future
            return

        try:
            result = self.call(how)
        except BaseException as error:
            del self.task, self.call, self.future
            future.set_exception(error)
            # The traceback refers to this frame: no cycle from it to the exception.
            del future
        else:
            del self.task, self.call, self.future
            future.set_result(result)

    def describe(self, frames: cabc.Mapping[int, FrameType]) -> tuple[str, str] | None:
        """Return the task's name and its stack in a snapshot, unless it is done."""
        frame = frames.get(self.thread)
        stack = "".join(traceback.format_stack(frame)) if frame else _NO_STACK
        task = getattr(self, "task", None)
        return None if task is None else (task_name(task), stack)


def bind(task: t.Any, args: tuple[t.Any, ...], kwargs: dict[str, t.Any]) -> Call[t.Any]:
    """Bind a task to its arguments alone."""
    return functools.partial(_call, task, args, kwargs)


def _call(
    task: t.Any, args: tuple[t.Any, ...], kwargs: dict[str, t.Any], how: How
) -> t.Any:
    return call_task(task, args, kwargs)
