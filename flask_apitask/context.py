from __future__ import annotations

import contextvars
import typing as t

import flask
from flask import has_request_context
from flask.ctx import AppContext
from flask.globals import app_ctx

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import contextlib
    from types import TracebackType

    from flask import Flask
    from flask import Request

    from .scope import TaskScope

# Flask 3.2 merges the request context into the app context.
MERGED = hasattr(AppContext, "has_request")

# These return the current context, and raise RuntimeError where there is none. They are
# called in every request: a function around them would be half of what that costs.
get_app_context: cabc.Callable[[], t.Any]
get_app_context = app_ctx._get_current_object  # type: ignore[attr-defined]
_request_context: t.Any = app_ctx if MERGED else flask.globals.request_ctx
_get_request_context: cabc.Callable[[], t.Any] = _request_context._get_current_object


def find_app_context() -> t.Any | None:
    """Return the current app context, or ``None`` outside of one."""
    try:
        return get_app_context()
    except RuntimeError:
        return None


def find_request_context() -> t.Any | None:
    """Return what Flask pushed for the current request, or ``None`` outside of one.

    A copy made by :func:`flask.copy_current_request_context` is another object, though
    its request is the same.
    """
    if MERGED and not has_request_context():
        return None

    try:
        return _get_request_context()
    except RuntimeError:
        return None


class Block(t.NamedTuple):
    """A ``with`` block around the caller, or the task that the caller is inside of.

    :param scope: The block's scope; ``None`` for a task, where another one is a plain
        call.
    :param request: The request that it is part of, if any. Another request, made inside
        of it, does not see it.
    """

    app: Flask
    scope: TaskScope | None
    request: Request | None
    outer: Block | None = None


current_block: contextvars.ContextVar[Block | None] = contextvars.ContextVar(
    "flask_apitask", default=None
)


def task_context(app: Flask) -> contextlib.AbstractContextManager[object]:
    """Push an app context of a task's own, under which ``request`` stays visible.

    Its ``g`` is empty, and ``teardown_appcontext`` functions run at its end, but no
    ``teardown_request`` functions.
    """
    if MERGED and has_request_context() and app_ctx.app is app:
        return _MergedTaskContext(app_ctx)

    return app.app_context()


class _MergedTaskContext:
    """A copy of the current context that can be popped without ending the request."""

    def __init__(self, context: t.Any) -> None:
        self._context = context.copy()

    def __enter__(self) -> None:
        # With an adapter, push() routes the shared request once more, and undoes what a
        # url_value_preprocessor did for the view.
        adapter, self._context.url_adapter = self._context.url_adapter, None
        self._context.push()
        self._context.url_adapter = adapter

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # With the request, pop() would run the teardown_request functions, and close
        # the uploads. Not to pop would leave a reference cycle through the app.
        self._context._request = None
        self._context.pop(exc_value)
