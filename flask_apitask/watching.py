from __future__ import annotations

import sys
import typing as t
import weakref
from types import FunctionType

from flask import Flask
from flask import got_request_exception
from flask import request_finished

from .closing import close_with
from .closing import Closing
from .context import find_request_context
from .context import mix_in
from .outcome import find_failure
from .outcome import WatchedBody
from .request_scope import ClosesUnsent
from .request_scope import find_request_scope

if t.TYPE_CHECKING:
    from flask import Response

# Where Flask catches the exceptions that leave a view.
_DISPATCH: t.Final = Flask.full_dispatch_request.__code__
# A key in the extensions of an app in which tasks have been deferred.
_WATCHED: t.Final = "apitask_watched"


def watch(app: Flask) -> None:
    """Watch how the requests of an app end. Idempotent."""
    if _WATCHED not in app.extensions:
        watch_responses(app)
        app.extensions[_WATCHED] = True

    method = vars(app).get("handle_user_exception")

    # An extension set up later may have put a method of its own in front of ours. With
    # functools.wraps(), or as a proxy, it has our name and module, but not our globals.
    if not (type(method) is FunctionType and method.__globals__ is globals()):
        watch_exceptions(app)


def watch_exceptions(app: Flask) -> None:
    """Note the exceptions that leave a view, even those with an error handler.

    Flask sends no signal for an exception that has a handler, so one of its methods is
    replaced. This happens only in apps that need it, when they first defer a task.
    """
    # Another extension may have replaced the method too. The weak reference avoids a
    # cycle through the app.
    replaced = "handle_user_exception" in vars(app)
    method: t.Any = (app if replaced else type(app)).handle_user_exception
    app_ref = weakref.ref(app)

    def handle_user_exception(*args: t.Any) -> t.Any:
        # From Flask 3.2 on, the context comes before the exception.
        note_exception(args[-1])
        return method(*args) if replaced else method(app_ref(), *args)

    app.handle_user_exception = handle_user_exception  # type: ignore[assignment, method-assign]
    error = sys.exc_info()[1]
    traceback = None if error is None else error.__traceback__

    # The first task may be deferred in an error handler, whose exception was caught
    # before the method was replaced.
    if traceback and traceback.tb_frame.f_code is _DISPATCH:
        note_exception(error)


def note_exception(error: BaseException | None) -> None:
    """Note an exception that has left the view of the current request."""
    context, failure = find_request_context(), find_failure(error)

    if context is not None and failure is not None:
        find_request_scope(context).failure = failure


def watch_responses(app: Flask) -> None:
    """Watch the responses of an app before they leave it. Idempotent."""
    request_finished.connect(_hook_response, app)
    got_request_exception.connect(_unhook_response, app)


def _hook_response(app: Flask, response: Response, **extra: object) -> None:
    """Make a response wait at its close; for :data:`flask.request_finished`."""
    context = find_request_context()
    scope = find_request_scope(context)
    answers_first = app.extensions["apitask"].config.wait == "close"
    is_file, is_stream = response.direct_passthrough, False

    status = response.status_code

    if status >= 400 and scope.failure is None:
        scope.failure = f"the response has the status {status}"

    # A running task may defer another one during the stream. abort(redirect("/")) comes
    # as a streamed response, hence the status.
    if scope.is_used and _WATCHED in app.extensions and status < 300:
        is_stream = response.is_streamed and not is_file

    # A task may still be started in the body or in a teardown function. But if there is
    # none yet, leave a file to the server, which may have its own way to send it.
    if is_stream or scope.defers or (answers_first and (scope.is_used or not is_file)):
        closing = Closing(answers_first, is_stream)

        if is_stream:
            response.response = WatchedBody(response.response, closing.close)

        close_with(response, closing)
        scope.closing = weakref.ref(closing)

        if scope.is_used:
            mix_in(context, ClosesUnsent)


def _unhook_response(app: Flask, **extra: object) -> None:
    """Forget a response that is replaced; for :data:`flask.got_request_exception`."""
    request_context = find_request_context()

    # Other libraries send this signal too, even outside a request.
    if request_context is not None:
        find_request_scope(request_context).closing = None
