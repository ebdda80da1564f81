from __future__ import annotations

from .exceptions import ApiTaskError as ApiTaskError
from .exceptions import ScopeClosed as ScopeClosed
from .extension import ApiTask as ApiTask
from .extension import open_scope as open_scope
from .extension import scoped as scoped
from .scope import TaskScope as TaskScope
from .signals import task_finished as task_finished
from .signals import task_started as task_started
from .stack import current_scope as current_scope
from .stack import run as run
from .stack import wait as wait
from .tasks import Task as Task
from .tasks import task as task

__all__ = [
    "ApiTask",
    "ApiTaskError",
    "ScopeClosed",
    "Task",
    "TaskScope",
    "current_scope",
    "open_scope",
    "run",
    "scoped",
    "task",
    "task_finished",
    "task_started",
    "wait",
]
