from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import typing as t
from types import CodeType

from flask import has_request_context
from flask import request

from .executor.task import task_name
from .log import find_logger
from .log import log
from .log import log_once
from .log import PACKAGE

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from .executor.runner import TimeoutReport

    Fn = cabc.Callable[..., t.Any]


def log_failure(app: Flask, task: Fn, error: BaseException, duration: float) -> None:
    """Log the one ERROR of a task that failed.

    :param duration: Seconds that it ran.
    """
    outcome = f"failed after {duration:.3f} s"
    _log_task(app, task_name(task), outcome, task, error=error, duration=duration)


def log_drop(app: Flask, task: Fn, reason: str) -> None:
    """Log an INFO about a deferred task that will never run."""
    name = task_name(task)
    _log_task(app, name, f"was dropped: {reason}", task, level=logging.INFO)


def log_timeout(app: Flask, report: TimeoutReport) -> None:
    """Log an ERROR for each task that never ran, and one WARNING about the others."""
    is_key = report.timeout == app.extensions["apitask"].config.timeout
    source = "APITASK_TIMEOUT" if is_key else "timeout of the scope"

    for name in report.cancelled:
        outcome = f"was cancelled: not started within {report.timeout} s ({source})"
        _log_task(app, name, outcome, duration=0.0)

    if report.running:
        _log(
            app,
            logging.WARNING,
            "Stopped waiting for the tasks%s after %s s (%s): %d task(s) still running."
            " Overdue tasks now hold %d thread(s) of the app. Stacks of those still"
            " running:\n\n%s",
            _of_request(),
            report.timeout,
            source,
            len(report.running),
            report.abandoned,
            "\n".join(f"{name!r}:\n{stack}" for name, stack in report.running),
            tasks=[name for name, _ in report.running],
            abandoned_threads=report.abandoned,
        )


def log_callback(app: Flask, callback: Fn, error: BaseException) -> None:
    """Log an ERROR about a done callback that failed."""
    text = "The done callback %r%s failed."
    name, of_request = task_name(callback), _of_request()
    _log(
        app, logging.ERROR, text, name, of_request, fn=callback, task=name, error=error
    )


def warn_of_session(app: Flask, task: Fn, changes: list[str]) -> None:
    """Log a WARNING, once per app, about a task's changes to its session."""
    log_once(
        app,
        "session",
        "Task %r%s changed the session (%s). The change was dropped, because the"
        " response may already have its cookie. Change the session in the view.",
        task_name(task),
        _of_request(),
        ", ".join(map(str, changes)),
        place=_find_place(app, task),
    )


def warn_of_generator(app: Flask, task: Fn) -> None:
    """Log a WARNING, once per app and task, about a generator function."""
    name = task_name(task)
    log_once(
        app,
        f"generator {name}",
        "Task %r%s is a generator function, so its body has not run. Start a function"
        " that iterates over it.",
        name,
        _of_request(),
        place=_find_place(app, task),
    )


def _log_task(
    app: Flask,
    name: str,
    outcome: str,
    task: Fn | None = None,
    level: int = logging.ERROR,
    **fields: t.Any,
) -> None:
    text = "Task %r%s %s."
    args = name, _of_request(), outcome
    _log(app, level, text, *args, fn=task, task=name, **fields)


def _log(
    app: Flask,
    level: int,
    text: str,
    *args: object,
    fn: Fn | None = None,
    **fields: t.Any,
) -> None:
    """Log a record with the endpoint, and with the place of a function."""
    fields["endpoint"] = request.endpoint if has_request_context() else None
    place = _find_place(app, fn)
    log(find_logger(app), level, text, *args, place=place, **fields)


def _of_request() -> str:
    """Name the current request by its URL rule, because its path may hold a secret."""
    if not has_request_context():
        return ""

    rule = request.url_rule
    return f" of {request.method} {rule.rule if rule else '(no route)'}"


def _find_place(app: Flask, fn: Fn | None) -> CodeType | None:
    """Return the code of a function, or else of the view, but never of this package."""
    endpoint = request.endpoint if has_request_context() else None
    view = None if endpoint is None else app.view_functions.get(endpoint)

    found: t.Any

    for found in (fn, view):
        while isinstance(found, functools.partial):
            found = found.func

        # A mock has every attribute, and a proxy may unwrap to itself for ever.
        with contextlib.suppress(Exception):
            code = getattr(inspect.unwrap(found), "__code__", None)

            if isinstance(code, CodeType) and not code.co_filename.startswith(PACKAGE):
                return code

    return None
