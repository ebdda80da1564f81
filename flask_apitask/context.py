from __future__ import annotations

import typing as t

import flask
from flask import has_app_context
from flask import has_request_context
from flask.ctx import AppContext
from flask.globals import app_ctx

if t.TYPE_CHECKING:
    import contextlib
    from types import TracebackType

    from flask import Flask

# Flask 3.2 merges the request context into the app context.
_MERGED = hasattr(AppContext, "has_request")
_request_context: t.Any = app_ctx if _MERGED else flask.globals.request_ctx


def find_app_context() -> AppContext | None:
    """Return the current app context, or ``None`` outside of one."""
    if not has_app_context():
        return None

    return app_ctx._get_current_object()  # type: ignore[attr-defined, no-any-return]


def find_request_context() -> t.Any | None:
    """Return what Flask pushed for the current request, or ``None`` outside of one.

    A copy made by :func:`flask.copy_current_request_context` is another object, though
    its request is the same.
    """
    return _request_context._get_current_object() if has_request_context() else None


def task_context(app: Flask) -> contextlib.AbstractContextManager[object]:
    """Push an app context of a task's own, under which ``request`` stays visible.

    Its ``g`` is empty, and ``teardown_appcontext`` functions run at its end, but no
    ``teardown_request`` functions.
    """
    if _MERGED and has_request_context() and app_ctx.app is app:
        return _MergedTaskContext(app_ctx)

    return app.app_context()


class _MergedTaskContext:
    """A copy of the current context that is not popped, as that ends the request.

    The context variable that it is pushed to belongs to the task and goes with it.
    """

    def __init__(self, context: t.Any) -> None:
        self._context = context.copy()

    def __enter__(self) -> None:
        self._context.push()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._context.app.do_teardown_appcontext(self._context, exc_value)
