from __future__ import annotations

import contextvars
import dataclasses
import functools
import operator
import typing as t

import flask.globals
from flask import Flask
from flask.ctx import AppContext
from werkzeug.local import LocalProxy

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import contextlib
    from types import TracebackType

    from flask import Request

    from .executor.scope import TaskScope

# Flask 3.2 merges the request context into the app context.
MERGED: t.Final = hasattr(AppContext, "has_request")


def _find_variable(proxy: t.Any) -> contextvars.ContextVar[t.Any]:
    """Return the context variable behind a proxy, from its ``__wrapped__``."""
    # In an empty context, because a bound proxy asks its object for the attribute.
    variable: contextvars.ContextVar[t.Any]
    variable = contextvars.Context().run(getattr, proxy, "__wrapped__")
    return variable


_app_var = _find_variable(flask.globals.app_ctx)
_request_var = _app_var if MERGED else _find_variable(flask.globals.request_ctx)


def unwrap_app(app: object, taker: str) -> Flask:
    """Return the app itself, where a proxy such as ``current_app`` may be given.

    :param taker: Who takes the app, and what it takes, as the start of a sentence.
    :raises TypeError: It is not a Flask app.
    """
    if isinstance(app, LocalProxy):
        app = app._get_current_object()

    if not isinstance(app, Flask):
        raise TypeError(f"{taker}, not {app!r}.")

    return app


def find_app_context() -> t.Any | None:
    """Return the current app context, if there is one."""
    return _app_var.get(None)


def find_request_context() -> t.Any | None:
    """Return the context that Flask pushed for the current request, if there is one.

    :func:`flask.copy_current_request_context` pushes another object.
    """
    context = _request_var.get(None)
    return None if MERGED and context and not context.has_request else context


def is_pushed_again(request_context: t.Any) -> bool:
    """Return whether a request that was torn down will be torn down again.

    Before Flask 3.2, :func:`flask.stream_with_context` pushes the context again for the
    body. A thread that outlives the request sees a context that is not pushed. The last
    thing that the end of the first push does is to take the request out of the environ.
    """
    if MERGED or not request_context._cv_tokens:
        return False

    return request_context.request.environ.get("werkzeug.request") is None


@dataclasses.dataclass(slots=True, eq=False)
class Frame:
    """A ``with`` block around the caller, or the task that the caller is in.

    :param scope: The block's scope; ``None`` for a task, in which ``run()`` is a plain
        call.
    :param request: The request that the frame is part of, if any. A nested request does
        not see the frame.
    :param task_of: Returns the scope of the task while that scope exists.
    """

    app: Flask
    scope: TaskScope | None
    request: Request | None
    parent: Frame | None = None
    task_of: cabc.Callable[[], TaskScope | None] | None = None


current_frame: contextvars.ContextVar[Frame | None]
current_frame = contextvars.ContextVar("flask_apitask", default=None)

# The task's own copies of shared objects, by key; None where there is no task.
task_locals: contextvars.ContextVar[dict[object, t.Any] | None]
task_locals = contextvars.ContextVar("flask_apitask_locals", default=None)


def walk_frames() -> cabc.Iterator[Frame]:
    """Yield the frames around the caller, innermost first."""
    frame = current_frame.get()

    while frame is not None:
        yield frame
        frame = frame.parent


def is_in_task(request: Request | None) -> bool:
    """Return whether the caller is in a task of this request; ``None``: of none."""
    frames = walk_frames()
    return any(frame.scope is None and frame.request is request for frame in frames)


def mix_in(instance: t.Any, mixin: t.Any) -> None:
    """Make an object an instance of another class too. Idempotent."""
    if not isinstance(instance, mixin):
        base: t.Any = type(instance)
        instance.__class__ = _mix(mixin, base)


@functools.lru_cache
def _mix(mixin: t.Any, base: t.Any) -> t.Any:
    return type(base.__name__, (mixin, base), {})


def _merged_task_context(app: Flask) -> contextlib.AbstractContextManager[object]:
    context = find_request_context()
    is_in_request = context is not None and context.app is app
    return _MergedTaskContext(context) if is_in_request else app.app_context()


class _MergedTaskContext:
    """A copy of the current context that can be popped without ending the request."""

    def __init__(self, context: t.Any) -> None:
        self._context = context.copy()

    def __enter__(self) -> None:
        # With an adapter, push() would route the shared request again and undo what a
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
        # With the request, pop() would run the teardown_request functions and close the
        # uploads. Without a pop there would be a reference cycle through the app.
        request, self._context._request = self._context._request, None

        try:
            self._context.pop(exc_value)
        finally:
            # Tasks deferred by this task run later, with a copy of its context
            # variables.
            self._context._request = request


# Makes a task's own app context, in which the request stays visible. Its g is empty,
# and its end runs the teardown_appcontext functions, but not the teardown_request ones.
task_context: cabc.Callable[[Flask], contextlib.AbstractContextManager[object]]
task_context = _merged_task_context if MERGED else operator.methodcaller("app_context")
