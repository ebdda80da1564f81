from __future__ import annotations

import sys
import typing as t
import weakref

from flask import Flask
from flask import got_request_exception
from flask import request_finished

from .closing import close_with
from .closing import Closing
from .context import find_request_context
from .outcome import find_failure
from .outcome import WatchedBody
from .request_scope import find_request_scope

if t.TYPE_CHECKING:
    from flask import Response

# Where Flask catches what leaves a view.
_DISPATCH: t.Final = Flask.full_dispatch_request.__code__
# A key of the extensions of an app in which tasks have been put off.
_WATCHED: t.Final = "apitask_watched"


def watch(app: Flask) -> None:
    """Look at what becomes of the requests of an app. Idempotent."""
    if _WATCHED not in app.extensions:
        watch_responses(app)
        watch_exceptions(app)
        app.extensions[_WATCHED] = True


def watch_exceptions(app: Flask) -> None:
    """Note the exceptions that leave a view, also if an error handler answers.

    Flask tells nobody of those that have a handler. So this method is replaced, in apps
    that need it: by the first task that is put off.
    """
    # Another extension may have replaced it, too. No cycle through the app.
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

    # This is the first call, and in an error handler.
    if traceback and traceback.tb_frame.f_code is _DISPATCH:
        note_exception(error)


def note_exception(error: BaseException | None) -> None:
    """Note an exception that has left the view of the current request."""
    context, failure = find_request_context(), find_failure(error)

    if context is not None and failure is not None:
        find_request_scope(context).failure = failure


def watch_responses(app: Flask) -> None:
    """Look at the app's responses before they leave it. Idempotent."""
    request_finished.connect(_hook_response, app)
    got_request_exception.connect(_unhook_response, app)


def _hook_response(app: Flask, response: Response, **extra: object) -> None:
    """Make a response wait when it is closed; for :data:`flask.request_finished`."""
    scope = find_request_scope(find_request_context())
    answers_first = app.extensions["apitask"].config.wait == "close"
    is_file, is_stream = response.direct_passthrough, False

    status = response.status_code

    if status >= 400 and scope.failure is None:
        scope.failure = f"the response has the status {status}"

    # A task that runs may put something off while the stream goes. Werkzeug makes a
    # stream of abort(redirect("/")).
    if scope.is_used and _WATCHED in app.extensions and status < 300:
        is_stream = response.is_streamed and not is_file

    # A task may come later, in the body or in a teardown function. But without one a
    # file is best left to the server, which may have its own way to send it.
    if is_stream or scope.defers or (answers_first and (scope.is_used or not is_file)):
        closing = Closing(answers_first, is_stream)

        if is_stream:
            response.response = WatchedBody(response.response, closing.close)

        close_with(response, closing)
        scope.closing = weakref.ref(closing)


def _unhook_response(app: Flask, **extra: object) -> None:
    """Expect another response; for :data:`flask.got_request_exception`."""
    request_context = find_request_context()

    # Others send this signal too, wherever they are.
    if request_context is not None:
        find_request_scope(request_context).closing = None
