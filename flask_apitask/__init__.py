"""Background work that belongs to a request.

::

    from flask import Flask
    from flask_apitask import ApiTask, run

    app = Flask(__name__)
    ApiTask(app)

    @app.post("/signup")
    def signup():
        run(notify_crm, "ada@example.org")  # on a thread, while the view goes on
        return "", 204  # the response leaves when notify_crm() has returned

:class:`ApiTask` sets up an app. :func:`run` starts a task on a thread, and the request
waits for its tasks before its response is finalized. :func:`wait`, :func:`scoped`,
:func:`open_scope` and :func:`current_scope` are for when that is not enough. With
``APITASK_MAIL_BACKGROUND`` on, such tasks also send the mail of Flask-Mail and
Flask-Mailman.
"""

from __future__ import annotations

import importlib
import typing as t

from .api import current_scope as current_scope
from .api import open_scope as open_scope
from .api import run as run
from .api import scoped as scoped
from .api import wait as wait
from .executor.exceptions import ApiTaskError as ApiTaskError
from .executor.exceptions import ScopeClosed as ScopeClosed
from .executor.scope import TaskScope as TaskScope
from .executor.task import Task as Task
from .executor.task import task as task
from .extension import ApiTask as ApiTask
from .on_commit import run_on_commit as run_on_commit
from .on_success import run_on_success as run_on_success
from .signals import task_finished as task_finished
from .signals import task_started as task_started

if t.TYPE_CHECKING:
    from .exceptions import DeliveryError as DeliveryError
    from .exceptions import DeliveryUnknown as DeliveryUnknown

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
    "run_on_commit",
    "run_on_success",
    "scoped",
    "task",
    "task_finished",
    "task_started",
    "wait",
]


def __getattr__(name: str) -> t.Any:
    # These need smtplib, which is slow to import, and most apps never use them.
    if name in ("DeliveryError", "DeliveryUnknown", "exceptions"):
        exceptions = importlib.import_module(".exceptions", __name__)
        return getattr(exceptions, name, exceptions)

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
