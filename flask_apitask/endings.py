from __future__ import annotations

import functools
import itertools
import sys
import typing as t

from flask import got_request_exception
from flask import has_request_context
from flask import request_finished

from . import closing
from .context import find_request_context
from .context import get_app_context
from .context import MERGED
from .jobs import find_endpoint
from .jobs import log_failure
from .stack import SCOPES

if t.TYPE_CHECKING:
    from flask import Flask
    from flask import Response

    from .scope import Overdue
    from .scope import TaskScope
    from .stack import AppState

# Scopes that a view has left already, but that end with the response: kept on the app
# context as those of requests are, each value a list.
_LEFT = "_flask_apitask_left"


def connect(app: Flask) -> None:
    """Get to know the responses of an app, so that its scopes can end with them.

    Doing it twice is harmless.
    """
    request_finished.connect(_hook_response, app)
    got_request_exception.connect(_unhook_response, app)


def _hook_response(app: Flask, response: Response, **extra: object) -> None:
    """Hook a response; for :data:`flask.request_finished`."""
    app_context = vars(get_app_context())
    request_context = find_request_context()
    hooks = request_context in (app_context.get(_LEFT) or ())

    if _answers_first(app):
        # A task may come later, in the body or in a teardown function. But without one
        # a file is best left to the server, which may have its own way to send it.
        opened = request_context in (app_context.get(SCOPES) or ())
        hooks = hooks or opened or not response.direct_passthrough

    if hooks:
        closing.hook(request_context, response)


def _unhook_response(app: Flask, **extra: object) -> None:
    """Expect another response; for :data:`flask.got_request_exception`."""
    request_context = find_request_context()

    # Others send the signal as well, wherever they are.
    if request_context is not None:
        closing.unhook(request_context)


def _answers_first(app: Flask) -> bool:
    state: AppState = app.extensions["apitask"]
    return state.config.wait == "close"


def leave_to_response(app: Flask, scope: TaskScope) -> bool:
    """Have a scope end with the response to the current request, if there is one."""
    app_context = vars(get_app_context())
    request_context = find_request_context()
    is_over = app_context.get(SCOPES, {}) is None

    if request_context is None or request_context.app is not app or is_over:
        return False

    connect(app)
    scope.shutdown(wait=False)
    app_context.setdefault(_LEFT, {}).setdefault(request_context, []).append(scope)
    return True


def end_request_scope(exc: BaseException | None) -> None:
    """End the request's scopes; for :meth:`flask.Flask.teardown_request`.

    Or have them end with the response, if they shall and if there is one.
    """
    app_context = get_app_context()
    scopes = app_context.__dict__.get(SCOPES)
    left = app_context.__dict__.get(_LEFT)

    if not (scopes or left):
        return

    app: Flask = app_context.app
    request_context = find_request_context()
    error = sys.exc_info()[1]
    at_close = None

    # With an exception on its way, the server will have no response to close. But this
    # one is raised where it closes a generator that has the request's context.
    if error is None or isinstance(error, GeneratorExit):
        at_close = closing.find_closing(request_context)

    if left and request_context in left:
        # One by one: the safety net finds the others if a wait is interrupted.
        while left[request_context]:
            _end_with(at_close, app, left[request_context].pop(0))

        del left[request_context]

    scope = (scopes or {}).pop(request_context, None)

    if scope is not None:
        _end_with(at_close if _answers_first(app) else None, app, scope)


def _end_with(at_close: closing.Closing | None, app: Flask, scope: TaskScope) -> None:
    if at_close is None:
        end(app, scope)
    else:
        scope.shutdown(wait=False)
        at_close.add(functools.partial(end, app, scope))


def end_app_context_scopes(exc: BaseException | None) -> None:
    """End what :func:`end_request_scope` did not come to end.

    For :meth:`flask.Flask.teardown_appcontext`. Before Flask 3.2, a function registered
    for ``teardown_request`` that raises keeps those registered before it from running.
    """
    app_context = get_app_context()
    scopes = app_context.__dict__.pop(SCOPES, None)
    left = app_context.__dict__.pop(_LEFT, None)

    if scopes or left:
        were_left = itertools.chain(*(left or {}).values())

        for scope in [*were_left, *(scopes or {}).values()]:
            end(app_context.app, scope)

    if MERGED and has_request_context():
        # From Flask 3.2 on, the request is still there for what is torn down after
        # this. Nobody would end a scope that is opened now.
        app_context.__dict__[SCOPES] = None


def end(app: Flask, scope: TaskScope) -> None:
    """End a scope, and log what it left behind at its deadline."""
    overdue = scope.end()

    if overdue is not None:
        _report(app, overdue)


def _report(app: Flask, overdue: Overdue) -> None:
    for name in overdue.cancelled:
        message = f"was cancelled: not begun within {overdue.timeout} s"
        log_failure(app, name, message, None, 0.0)

    if overdue.running:
        app.logger.warning(
            "Went on without %d task(s) not done after %s s. Tasks like that hold %d"
            " thread(s) of the app now. These are in:\n\n%s",
            len(overdue.running),
            overdue.timeout,
            overdue.held,
            "\n".join(f"{name!r}:\n{stack}" for name, stack in overdue.running),
            extra={
                "action": "apitask",
                "task_names": [name for name, _ in overdue.running],
                "overdue_threads": overdue.held,
                "endpoint": find_endpoint(),
            },
        )
