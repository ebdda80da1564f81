from __future__ import annotations

import contextvars
import dataclasses
import functools
import operator
import typing as t

import flask
from flask import has_request_context
from flask.ctx import AppContext
from flask.globals import _cv_app
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

# Of a request context: that it is torn down; from Flask 3.2 on.
_OVER = "_flask_apitask_over"


def _find_merged_context() -> t.Any | None:
    return find_app_context() if has_request_context() else None


# They return the current app context, and what Flask pushed for the current request, or
# None. A copy of the latter, by copy_current_request_context(), is another object. Each
# task and each request's end looks for them, and Flask's proxies take longer for it.
find_app_context: cabc.Callable[[], t.Any | None]
find_app_context = functools.partial(_cv_app.get, None)
find_request_context: cabc.Callable[[], t.Any | None]
find_request_context = (
    _find_merged_context
    if MERGED
    else functools.partial(flask.globals._cv_request.get, None)
)


class _TornDown(tuple[t.Any, ...]):
    """What a request context has of a push whose teardown has come; before Flask 3.2.

    Equal to what Flask has put there, and gone with it: to keep that elsewhere would
    make a reference cycle, by the context variables that it refers to.
    """

    __slots__ = ()


def mark_over(request_context: t.Any) -> None:
    """Note that a request is torn down, though whoever has its context still sees it.

    Before Flask 3.2 its context can be pushed once more, and is not over then.
    """
    if MERGED:
        setattr(request_context, _OVER, True)
    else:
        # There is none where someone else calls for a teardown after the end.
        pushes = request_context._cv_tokens
        pushes[:1] = map(_TornDown, pushes[:1])


def is_over(request_context: t.Any) -> bool:
    """Return whether nobody would end a scope that is opened in a request now."""
    if MERGED:
        return hasattr(request_context, _OVER)

    try:
        return isinstance(request_context._cv_tokens[0], _TornDown)
    except IndexError:
        return True


@dataclasses.dataclass(slots=True, eq=False)
class Block:
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


def _merged_task_context(app: Flask) -> contextlib.AbstractContextManager[object]:
    if has_request_context() and app_ctx.app is app:
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


# It makes an app context of a task's own, under which the request stays visible: its g
# is empty, and teardown_appcontext functions run at its end, but none of those for
# teardown_request.
task_context: cabc.Callable[[Flask], contextlib.AbstractContextManager[object]]
task_context = _merged_task_context if MERGED else operator.methodcaller("app_context")
