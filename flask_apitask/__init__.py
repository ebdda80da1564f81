"""Background work that belongs to a request.

:class:`ApiTask` sets an app up. :func:`run` starts a task on a thread, and the request
waits for its tasks before its response is finalized. :func:`wait`, :func:`scoped`,
:func:`open_scope` and :func:`current_scope` are for when that is not enough. With
``APITASK_MAIL_BACKGROUND`` on, what Flask-Mail and Flask-Mailman send is sent by such
tasks.
"""

from __future__ import annotations

from .api import current_scope as current_scope
from .api import open_scope as open_scope
from .api import run as run
from .api import scoped as scoped
from .api import wait as wait
from .exceptions import ApiTaskError as ApiTaskError
from .exceptions import DeliveryError as DeliveryError
from .exceptions import DeliveryUnknown as DeliveryUnknown
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
    "DeliveryError",
    "DeliveryUnknown",
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
