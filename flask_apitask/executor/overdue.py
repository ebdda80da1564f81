from __future__ import annotations

import sys
import traceback
import typing as t

from .task import exit_grace
from .task import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc
    from types import FrameType

    from .future import TaskFuture

# Modules directly in these packages call tasks, and are of no use in a stack. Their
# subpackages hold tasks, such as the one that delivers mail.
_CALLERS: t.Final = (__package__, __package__.rpartition(".")[0])

_NO_STACK: t.Final = (
    "  (no stack: the task is async or not written in Python, or no thread is running"
    " it)\n"
)


class OverdueTask(t.NamedTuple):
    """A task that is still running at its deadline.

    :param stack: The stack of its thread, as text.
    :param thread: The identifier of that thread.
    :param exit_grace: Seconds that the exit of the process may wait for it.
    """

    name: str
    stack: str
    thread: int
    exit_grace: float


def find_overdue(
    futures: cabc.Iterable[TaskFuture[t.Any]], timeout: float
) -> list[OverdueTask]:
    """Describe the tasks that run at their deadline, leaving out any done meanwhile."""
    overdue: list[OverdueTask] = []
    frames = sys._current_frames()

    try:
        for future in futures:
            if (task := future.task) is not None:
                thread = future.thread
                stack = format_stack(frames.get(thread))
                grace = exit_grace(task, timeout)
                overdue.append(OverdueTask(task_name(task), stack, thread, grace))
    finally:
        # This frame is one of them: avoid a reference cycle.
        del frames

    return overdue


def format_stack(frame: FrameType | None) -> str:
    """Format the stack of a thread, from the task's own first line on.

    A thread that has not begun the task or has already left it has no such stack, nor
    does an async task, whose thread waits for an event loop, or a C function.
    """
    stack = [] if frame is None else [frame for frame, _ in traceback.walk_stack(frame)]

    # The start of the thread, and whatever a tool such as Sentry has wrapped around it.
    while stack and not _calls_tasks(stack[-1]):
        stack.pop()

    while stack and _calls_tasks(stack[-1]):
        stack.pop()

    if not stack or _find_module(stack[-1]).startswith("asgiref."):
        return _NO_STACK

    lines = ((frame, frame.f_lineno) for frame in reversed(stack))
    return "".join(traceback.StackSummary.extract(lines).format())


def _calls_tasks(frame: FrameType) -> bool:
    return _find_module(frame).rpartition(".")[0] in _CALLERS


def _find_module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
