from __future__ import annotations

from .api import current_scope as current_scope
from .api import open_scope as open_scope
from .api import run as run
from .api import scoped as scoped
from .api import wait as wait
from .exceptions import ApiTaskError as ApiTaskError
from .exceptions import ScopeClosed as ScopeClosed
from .executor.scope import TaskScope as TaskScope
from .executor.task import Task as Task
from .executor.task import task as task
from .extension import ApiTask as ApiTask
from .signals import task_finished as task_finished
from .signals import task_started as task_started

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
