from __future__ import annotations

import contextlib
import typing as t
import weakref
from collections import deque

from flask import got_request_exception
from flask import request_finished

from . import closing
from .context import find_request_context
from .context import is_over
from .context import mark_over

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask
    from flask import Response

    from .config import Config
    from .scope import TaskScope
    from .threads import Process

# Of a request context: its own scope, and those that a view has left already, but that
# end with the response. A copy of the context, in another thread or in the same, has
# none of them; nor has that of a nested request. Neither sees a scope, ends it or waits
# for it. A context variable would be lost if an asyncio task of an async view set it.
# Not by way of vars(): a context whose dict was asked for is slower from then on.
SCOPE = "_flask_apitask_scope"
_LEFT = "_flask_apitask_left"


def connect(app: Flask) -> None:
    """Get to know the responses of an app, so that its scopes can end with them.

    Doing it twice is harmless.
    """
    request_finished.connect(_hook_response, app)
    got_request_exception.connect(_unhook_response, app)


def _hook_response(app: Flask, response: Response, **extra: object) -> None:
    """Hook a response; for :data:`flask.request_finished`."""
    request_context = find_request_context()
    hooks = hasattr(request_context, _LEFT)

    if _answers_first(app):
        # A task may come later, in the body or in a teardown function. But without one
        # a file is best left to the server, which may have its own way to send it.
        opened = getattr(request_context, SCOPE, None)
        hooks = hooks or opened is not None or not response.direct_passthrough

    if hooks:
        closing.hook(request_context, response)


def _unhook_response(app: Flask, **extra: object) -> None:
    """Expect another response; for :data:`flask.got_request_exception`."""
    request_context = find_request_context()

    # Others send the signal as well, wherever they are.
    if request_context is not None:
        closing.unhook(request_context)


def _answers_first(app: Flask) -> bool:
    config: Config = app.extensions["apitask"].config
    return config.wait == "close"


def keep(
    request_context: object, scope: TaskScope, process: Process
) -> TaskScope | None:
    """Keep a scope until the end of the request, and return the one that is kept.

    Another thread with the very same context may have come first. There is none if the
    request is over.
    """
    with process.lock:
        kept: TaskScope = getattr(request_context, SCOPE, None) or scope
        setattr(request_context, SCOPE, kept)

    # Not before: who ends the request marks it as over, and then looks what is kept.
    if not is_over(request_context):
        return kept

    kept.shutdown()

    with process.lock:
        # Its context may be pushed anew by now, with another scope.
        if getattr(request_context, SCOPE) is kept:
            setattr(request_context, SCOPE, None)

    return None


def leave_to_response(app: Flask, scope: TaskScope) -> bool:
    """Have a scope end with the response to the current request, if there is one."""
    request_context = find_request_context()

    if request_context is None or request_context.app is not app:
        return False

    connect(app)
    process: Process = app.extensions["apitask"].threads.process

    with process.lock:
        left: deque[TaskScope] = getattr(request_context, _LEFT, deque())
        setattr(request_context, _LEFT, left)
        left.append(scope)

    scope.shutdown(wait=False)
    # To end it twice is harmless.
    return not is_over(request_context)


def end_with_teardown(app: Flask) -> None:
    """Have the scopes of each request to an app end with its teardown.

    After all functions for ``teardown_request``, though one raises. So what holds
    something for the request can give it back before the wait, and what starts a task
    is waited for. One more function would have neither, and is a higher price for each
    request: Flask asks each time whether it is ``async``.
    """
    original = vars(app).get("do_teardown_request")
    # Weak, as Flask takes care that an app goes without the garbage collector.
    reference: cabc.Callable[[], t.Any] = weakref.ref(app)

    def do_teardown_request(*args: t.Any, **kwargs: t.Any) -> None:
        app = reference()

        try:
            if original is None:
                type(app).do_teardown_request(app, *args, **kwargs)
            else:
                original(*args, **kwargs)
        finally:
            _end_request_scopes(app)

    app.do_teardown_request = do_teardown_request  # type: ignore[method-assign]


def _end_request_scopes(app: Flask) -> None:
    """End the scopes of the current request, which is taken for the one torn down."""
    request_context = find_request_context()

    if request_context is None or request_context.app is not app:
        return

    mark_over(request_context)
    scope: TaskScope | None = getattr(request_context, SCOPE, None)
    left: deque[TaskScope] | None = getattr(request_context, _LEFT, None)

    if scope is None and left is None:
        return

    at_close = closing.find_closing(request_context)

    try:
        if left:
            _end_left(left, at_close)
    finally:
        if scope is not None:
            setattr(request_context, SCOPE, None)

            if at_close is not None and _answers_first(app):
                _hand_over(at_close, scope)
            else:
                scope.end()


def _end_left(left: deque[TaskScope], at_close: closing.Closing | None) -> None:
    """End what views have left, in order, and all though one wait is interrupted."""
    with contextlib.ExitStack() as ends:
        for scope in reversed([*closing.drain(left)]):
            if at_close is None:
                ends.callback(scope.end)
            else:
                ends.callback(_hand_over, at_close, scope)


def _hand_over(at_close: closing.Closing, scope: TaskScope) -> None:
    scope.shutdown(wait=False)
    at_close.add(scope.end)
