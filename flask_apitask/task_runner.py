from __future__ import annotations

import threading
import time
import typing as t
import weakref

from .calling import call_observed
from .calling import LAZY
from .calling import notify
from .calling import run_body
from .context import current_frame
from .context import Frame
from .context import task_context
from .context import task_locals
from .executor.runner import Runner
from .executor.scope import TaskScope
from .executor.task import task_name
from .own_g import find_copier
from .own_session import find_changes
from .shared_body import share_body
from .shared_body import share_method
from .signals import task_dropped
from .signals import task_finished
from .signals import task_started
from .task_log import log_callback
from .task_log import log_drop
from .task_log import log_failure
from .task_log import log_timeout
from .task_log import warn_of_session

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import concurrent.futures
    import contextvars

    from flask import Flask
    from flask import Request

    from .executor.future import Callback
    from .executor.pool import ThreadPool
    from .executor.runner import How
    from .executor.runner import TimeoutReport
    from .executor.runner import Work

    Fn = cabc.Callable[..., t.Any]


class PlainRunner(Runner):
    """Calls the done callbacks of a plain call, in the contexts of its caller."""

    def __init__(self, app: Flask) -> None:
        self._app = app

    def call_back(
        self, callback: Callback, future: concurrent.futures.Future[t.Any]
    ) -> None:
        try:
            result = t.cast("t.Any", callback(future))

            if isinstance(result, LAZY):
                run_body(self._app, callback, result)
        except BaseException as error:
            log_callback(self._app, callback, error)

    def drop(self, work: Work, reason: str | None = None) -> None:
        """Log that a task was dropped, and send the signal."""
        task, args, kwargs, submitted = work

        if reason is not None:
            log_drop(self._app, task, reason)

        fields: dict[str, t.Any] = {"name": task_name(task), "submitted": submitted}
        fields |= {"args": args, "kwargs": kwargs}
        fields["reason"] = reason or "it was cancelled"
        notify(task_dropped, self._app, fields)


class TaskRunner(PlainRunner):
    """Calls each task of a scope in its own app context.

    If a task raises, that is logged once, and its future gets the exception.

    :param request: The request that the scope is part of, if any.
    :param copy_g: The names to copy to the task's own ``g``.
    """

    copy_context: cabc.Callable[[], contextvars.Context]
    raised: BaseException | None

    def __init__(
        self, app: Flask, request: Request | None, copy_g: tuple[str, ...] = ()
    ) -> None:
        self._app = app
        self._frame = Frame(app, None, request)
        self._copier = find_copier(app, copy_g)

        if self._copier is not None:
            self.copy_context = self._copier.copy_context

        # The request, if it has a body to share.
        self._shared: Request | None = None

        if request is not None and share_body(request):
            self._shared = request

    def make_scope(
        self, pool: ThreadPool, max_workers: int, timeout: float | None
    ) -> TaskScope:
        """Make the scope whose tasks this runner calls."""
        scope = TaskScope(pool, max_workers, timeout, self)
        # A weak reference, to avoid a reference cycle for each request.
        self._frame.task_of = weakref.ref(scope)
        return scope

    def run(self, work: Work, how: How) -> t.Any:
        task, args, kwargs, submitted = work
        app, started = self._app, time.monotonic()

        if self._shared is not None:
            task = share_method(self._shared, task)

        try:
            # A fast path: most apps have no receivers.
            if task_started.receivers or task_finished.receivers:
                call = (app, how, submitted, task, args, kwargs)
                return self._in_context(task, call_observed, call, {})

            return self._in_context(task, task, args, kwargs)
        except BaseException as error:
            log_failure(app, task, error, time.monotonic() - started)

            if app.extensions["apitask"].config.propagate:
                self.raised = self.raised or error

            raise

    def call_back(
        self, callback: Callback, future: concurrent.futures.Future[t.Any]
    ) -> None:
        if getattr(future, "thread", 0) == threading.get_ident():
            self._call_back(callback, future)
            return

        # The callback was added late, or the task was cancelled, by a thread that may
        # be serving a request or holding a lock. The callback must not run there.
        scope = None if self._frame.task_of is None else self._frame.task_of()

        if scope is None or not scope.call_back(self._call_back, callback, future):
            # The scope has ended. Only the exit of the process waits for the callback.
            scope = TaskScope(self._app.extensions["apitask"].pool, 1)
            scope.submit(self._call_back, callback, future)
            scope.shutdown(wait=False)

    def report(self, report: TimeoutReport) -> None:
        log_timeout(self._app, report)

    def _call_back(
        self, callback: Callback, future: concurrent.futures.Future[t.Any]
    ) -> None:
        try:
            self._in_context(callback, callback, (future,), {})
        except BaseException as error:
            log_callback(self._app, callback, error)

    def _in_context(
        self, task: Fn, fn: Fn, args: tuple[t.Any, ...], kwargs: dict[str, t.Any]
    ) -> t.Any:
        """Call a function, sync or async, in a task's own context."""
        current_frame.set(self._frame)
        own: dict[object, t.Any] = {}
        task_locals.set(own)

        with task_context(self._app):
            if self._copier is not None:
                self._copier.put()

            try:
                result = fn(*args, **kwargs)
                is_lazy = isinstance(result, LAZY)
                return run_body(self._app, fn, result) if is_lazy else result
            finally:
                if own and (changes := find_changes(own)):
                    warn_of_session(self._app, task, changes)
