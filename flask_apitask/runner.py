from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import os
import threading
import time
import typing as t
from types import CodeType
from types import CoroutineType

from flask import has_request_context
from flask import request

from .body import share_body
from .context import current_frame
from .context import Frame
from .context import task_context
from .context import task_locals
from .copied_g import find_copier
from .executor.runner import Runner
from .executor.scope import TaskScope
from .executor.task import task_name
from .log import log
from .log import log_once
from .session import find_changes
from .signals import task_finished
from .signals import task_started

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import concurrent.futures

    import blinker
    from flask import Flask
    from flask import Request

    from .executor.runner import How
    from .executor.runner import TimeoutReport

_PACKAGE = os.path.dirname(__file__)


class TaskRunner(Runner):
    """Call each task of a scope in an app context of its own.

    What a task raises is logged, once, before it is raised to the future.

    :param request: The request that the scope is part of, if any.
    :param copy_g: The names that a task finds in its own ``g``.
    """

    def __init__(
        self, app: Flask, request: Request | None, copy_g: tuple[str, ...] = ()
    ) -> None:
        self._app = app
        self._frame = Frame(app, None, request)
        self._copier = find_copier(app, copy_g)

        if self._copier is not None:
            self.copy_context = self._copier.copy_context

        if request is not None:
            share_body(request)

    def run(
        self,
        task: cabc.Callable[..., t.Any],
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        submitted: float,
        how: How,
    ) -> t.Any:
        app = self._app
        started = time.monotonic()
        current_frame.set(self._frame)
        own: dict[object, t.Any] = {}
        task_locals.set(own)

        try:
            with task_context(app):
                if self._copier is not None:
                    self._copier.put()

                try:
                    return call_observed(app, how, submitted, task, args, kwargs)
                finally:
                    if own:
                        self._check_session(own, task)
        except BaseException as error:
            duration = time.monotonic() - started
            outcome = f"failed after {duration:.3f} s"
            code = _find_code(task)
            log_failure(app, task_name(task), outcome, error, duration, code)
            raise

    def call_back(
        self,
        callback: cabc.Callable[[concurrent.futures.Future[t.Any]], object],
        future: concurrent.futures.Future[t.Any],
    ) -> None:
        if getattr(future, "thread", 0) == threading.get_ident():
            self._call_back(callback, future)
            return

        # It was added late, or the task was cancelled, by a thread that may serve a
        # request. What is bound to that thread is not for others.
        with TaskScope(self._app.extensions["apitask"].pool, 1) as scope:
            scope.submit(self._call_back, callback, future)

    def _call_back(
        self,
        callback: cabc.Callable[[concurrent.futures.Future[t.Any]], object],
        future: concurrent.futures.Future[t.Any],
    ) -> None:
        current_frame.set(self._frame)
        own: dict[object, t.Any] = {}
        task_locals.set(own)

        try:
            with task_context(self._app):
                if self._copier is not None:
                    self._copier.put()

                try:
                    callback(future)
                finally:
                    if own:
                        self._check_session(own, callback)
        except BaseException as error:
            _log_callback(self._app, callback, error)

    def _check_session(
        self, own: dict[object, t.Any], task: cabc.Callable[..., t.Any]
    ) -> None:
        if changes := find_changes(own):
            log_once(
                self._app,
                "session",
                "Task %r%s has changed the session (%s), which is dropped. The cookie"
                " may have been made by then: change the session in the view.",
                task_name(task),
                _of_request(),
                ", ".join(changes),
                place=_find_code(task),
            )

    def report(self, report: TimeoutReport) -> None:
        """Log an ERROR for each task that never ran, a WARNING for the others."""
        app = self._app

        for name in report.cancelled:
            outcome = f"was cancelled: not begun within {report.timeout} s"
            log_failure(app, name, outcome)

        if report.running:
            log(
                app.logger,
                logging.WARNING,
                "Went on%s without %d task(s) not done after %s s. Tasks like that hold"
                " %d thread(s) of the app now. These are in:\n\n%s",
                _of_request(),
                len(report.running),
                report.timeout,
                report.abandoned,
                "\n".join(f"{name!r}:\n{stack}" for name, stack in report.running),
                place=_find_view(app),
                tasks=[name for name, _ in report.running],
                abandoned_threads=report.abandoned,
                endpoint=_find_endpoint(),
            )


class PlainRunner(Runner):
    """Call done callbacks of a task that was a plain call, in its caller's contexts."""

    def __init__(self, app: Flask | None) -> None:
        self._app = app

    def call_back(
        self,
        callback: cabc.Callable[[concurrent.futures.Future[t.Any]], object],
        future: concurrent.futures.Future[t.Any],
    ) -> None:
        if self._app is None:
            super().call_back(callback, future)
            return

        try:
            callback(future)
        except BaseException as error:
            _log_callback(self._app, callback, error)


def call_observed(
    app: Flask | None,
    how: How,
    submitted: float,
    task: cabc.Callable[..., t.Any],
    args: tuple[t.Any, ...],
    kwargs: dict[str, t.Any],
) -> t.Any:
    """Call a task between its two signals.

    :param app: The sender; without one there are no signals.
    :param submitted: Seconds of the monotonic clock.
    """
    if app is None or not (task_started.receivers or task_finished.receivers):
        return _call(app, task, args, kwargs)

    fields: dict[str, t.Any] = {
        "name": task_name(task),
        "how": how,
        "submitted": submitted,
        "started": time.monotonic(),
    }
    notify(task_started, app, fields)
    fields["exception"] = None

    try:
        return _call(app, task, args, kwargs)
    except BaseException as error:
        fields["exception"] = error
        raise
    finally:
        fields["finished"] = time.monotonic()
        notify(task_finished, app, fields)
        # The exception's traceback refers to this frame: no cycle through it.
        del fields


def log_failure(
    app: Flask,
    name: str,
    outcome: str,
    error: BaseException | None = None,
    duration: float = 0.0,
    code: CodeType | None = None,
) -> None:
    """Write the one ERROR record of a task that failed, in the current context.

    :param outcome: What happened to the task, as in ``"Task 'x' <outcome>."``.
    :param duration: Seconds that it ran.
    :param code: The task's own code.
    """
    log(
        app.logger,
        logging.ERROR,
        "Task %r%s %s.",
        name,
        _of_request(),
        outcome,
        error=error,
        place=code or _find_view(app),
        task=name,
        endpoint=_find_endpoint(),
        duration=duration,
    )


def _log_callback(app: Flask, callback: t.Any, error: BaseException) -> None:
    log(
        app.logger,
        logging.ERROR,
        "The done callback %r%s failed.",
        task_name(callback),
        _of_request(),
        error=error,
        place=_find_code(callback),
        task=task_name(callback),
        endpoint=_find_endpoint(),
    )


def notify(signal: blinker.NamedSignal, app: Flask, fields: dict[str, t.Any]) -> None:
    """Send a signal; a receiver that raises is logged, and the task goes on."""
    try:
        signal.send(app, _async_wrapper=app.ensure_sync, **fields)
    except Exception as error:
        log(
            app.logger,
            logging.ERROR,
            "A receiver of the signal %r failed.",
            signal.name,
            error=error,
        )


def _call(
    app: Flask | None,
    task: cabc.Callable[..., t.Any],
    args: tuple[t.Any, ...],
    kwargs: dict[str, t.Any],
) -> t.Any:
    """Call a task, and run what it returns if it is ``async def``."""
    result = task(*args, **kwargs)

    if not isinstance(result, CoroutineType):
        return result

    # It takes long to import, and most apps have no such task.
    import asyncio

    try:
        run = asyncio.run if app is None else app.ensure_sync(_await)
        return _call_off_loop(run, result)
    finally:
        result.close()


def _call_off_loop(run: cabc.Callable[..., t.Any], coroutine: object) -> t.Any:
    """Run a coroutine, on another thread if this one has an event loop that runs.

    So it is where an async task or an async view makes a plain call.
    """
    import asyncio
    import concurrent.futures

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run(coroutine)

    with concurrent.futures.ThreadPoolExecutor(1, "apitask-async") as executor:
        context = contextvars.copy_context()
        return executor.submit(context.run, run, coroutine).result()


async def _await(coroutine: cabc.Coroutine[t.Any, t.Any, t.Any]) -> t.Any:
    return await coroutine


def _of_request() -> str:
    """Name the current request by its rule, as its path may hold a secret."""
    if not has_request_context():
        return ""

    rule = request.url_rule
    return f" of {request.method} {rule.rule if rule else '(no route)'}"


def _find_endpoint() -> str | None:
    return request.endpoint if has_request_context() else None


def _find_code(task: t.Any) -> CodeType | None:
    """Return the code of a task that is not this package's own."""
    while isinstance(task, functools.partial):
        task = task.func

    code = getattr(inspect.unwrap(task), "__code__", None)
    # That of a mock is a mock.
    is_known = isinstance(code, CodeType) and not code.co_filename.startswith(_PACKAGE)
    return code if is_known else None


def _find_view(app: Flask) -> CodeType | None:
    """Return the code of the current request's view."""
    endpoint = _find_endpoint()
    view = None if endpoint is None else app.view_functions.get(endpoint)
    return None if view is None else _find_code(view)
