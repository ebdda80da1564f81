from __future__ import annotations

import contextlib
import functools
import inspect
import time
import typing as t

from . import request_scope
from . import routes
from .block_scope import Block
from .block_scope import read_limits
from .config import read_wait
from .context import current_frame
from .context import find_app_context
from .context import find_request_context
from .context import walk_frames
from .executor.exceptions import ScopeClosed
from .executor.future import TaskFuture
from .executor.runner import Runner
from .executor.task import make_callable
from .log import log_once
from .runner import call_observed
from .runner import PlainRunner
from .watching import watch

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from .executor.scope import TaskScope
    from .executor.task import Task
    from .request_scope import AppState

P = t.ParamSpec("P")
T = t.TypeVar("T")


@t.overload
def run(
    task: cabc.Callable[P, cabc.Coroutine[t.Any, t.Any, T]],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> TaskFuture[T]: ...


@t.overload
def run(
    task: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> TaskFuture[T]: ...


@t.overload
def run(task: Task[T], /) -> TaskFuture[T]: ...


def run(task: t.Any, /, *args: t.Any, **kwargs: t.Any) -> TaskFuture[t.Any]:
    """Start a task that the current request, or ``with`` block, waits for.

    It runs on a thread, in an app context of its own, with the caller's request and
    context variables. An exception is logged and kept in the future, and the response
    is not affected.

    Where there is no scope (outside of a request, inside another task, after the
    request's scope was ended) the task is called here and now, in the caller's own
    context, and an exception is raised to the caller.

    Not for work that must survive the process, be retried, or take longer than the
    client cares to wait: that belongs in a task queue, to which :data:`APITASK_ROUTES`
    sends tasks by their names.

    :param task: A callable, sync or ``async def``, or a :class:`Task`.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments; none is taken by :func:`run` itself.
    :raises TypeError: ``task`` can't be called, or it is routed to Celery, and JSON
        can't carry an argument exactly.
    :return: The :class:`concurrent.futures.Future` of the task's result, which is done
        after a plain call. An ``async def`` view may ``await`` it. That of a task that
        goes to Celery is of its :class:`celery.result.AsyncResult`.
    """
    if routes.router is not None:
        task, args, kwargs = routes.router(task, args, kwargs)

    scope = _find_scope()

    if scope is not None:
        try:
            return scope.submit(task, *args, **kwargs)
        except ScopeClosed:
            pass

    task = make_callable(task)
    app_context = find_app_context()
    app = None if app_context is None else app_context.app

    if app is not None:
        warn_without_apitask(app)

    submitted = time.monotonic()
    result = call_observed(app, "inline", submitted, task, args, kwargs)
    runner = Runner() if app is None else PlainRunner(app)
    future: TaskFuture[t.Any] = TaskFuture(runner)
    future.set_result(result)
    return future


def warn_without_apitask(app: Flask, what: str = "run() was called") -> None:
    """Log a WARNING, once, in a request of an app that has no :class:`ApiTask`.

    :param what: What was done on the spot for that reason.
    """
    request_context = None if "apitask" in app.extensions else find_request_context()

    if request_context is not None and request_context.app is app:
        log_once(
            app,
            "without_apitask",
            "%s in a request of %r, which has no ApiTask: it was %s on the spot. Create"
            " one with ApiTask(app), or call its init_app(app).",
            what,
            app.name,
            what.rpartition(" ")[2],
        )


def wait(timeout: float | None = None) -> None:
    """Block until the tasks that the current scope was given so far are done.

    More tasks can be started after it. Exceptions of the tasks are in their futures and
    in the log, and are not raised here. Does nothing where there is no scope. Not
    needed at the end of a view: the request waits by itself.

    :param timeout: Seconds to wait at most, ``None`` for as long as it takes.
    :raises TimeoutError: Some are not done yet; they go on.
    :raises TypeError: ``timeout`` is not a number.
    """
    if not isinstance(timeout, int | float | None):
        raise TypeError(
            f"wait() takes a number of seconds, or None, and not {timeout!r}."
        )

    scope = _find_scope()

    if scope is not None:
        scope.wait(timeout)


def current_scope() -> TaskScope | None:
    """Return the scope that :func:`run` submits to here, if there is one.

    Use it as the executor that it is: ``loop.run_in_executor(current_scope(), ...)``.
    """
    scope = _find_scope()
    return None if scope is None or scope.closed else scope


@contextlib.contextmanager
def open_scope(
    *, max_workers: int | None = None, timeout: float | None = None
) -> cabc.Iterator[TaskScope]:
    """Open a scope for a block: in a command, a script, or part of a view.

    The tasks started in the block are done when it is left, whether it raises or not.
    Scopes nest: a task belongs to the innermost, and each waits for its own tasks.

    :param max_workers: The most tasks that run at once, ``None`` for
        :data:`APITASK_MAX_WORKERS`.
    :param timeout: Seconds that the end of the block waits, ``None`` for
        :data:`APITASK_TIMEOUT`, :data:`math.inf` for as long as it takes.
    :raises ValueError: A limit is not a positive number.
    :raises RuntimeError: There is no app context, or no :class:`ApiTask` on its app.
    """
    with Block(max_workers, timeout) as scope:
        yield scope


@t.overload
def scoped(view: cabc.Callable[P, T], /) -> cabc.Callable[P, T]: ...


@t.overload
def scoped(
    *,
    max_workers: int | None = None,
    timeout: float | None = None,
    wait: t.Literal["return", "close"] = "return",
) -> cabc.Callable[[cabc.Callable[P, T]], cabc.Callable[P, T]]: ...


def scoped(
    view: t.Any = None,
    /,
    *,
    max_workers: int | None = None,
    timeout: float | None = None,
    wait: t.Literal["return", "close"] = "return",
) -> t.Any:
    """Give one view, or any function, a scope of its own.

    Its tasks are done when it returns, not just at the end of the request. Use it with
    ``APITASK_ENABLED = False`` to have scopes only where you want them, or to set other
    limits. Put it below the route decorator, which registers the function below it::

        @app.post("/signup")
        @scoped(max_workers=2, timeout=5.0)
        def signup(): ...

    Above it, it has no effect: the app has registered the view without it. This is
    wrong::

        @scoped(max_workers=2, timeout=5.0)
        @app.post("/signup")
        def signup(): ...

    In a class-based view, put it in ``decorators``, or on a method.

    :param view: A function, sync or ``async def``.
    :param max_workers: As for :func:`open_scope`.
    :param timeout: As for :func:`open_scope`.
    :param wait: When to wait for the tasks: ``"return"``, or ``"close"`` for after the
        response to the request was sent, where there is a request.
    :raises TypeError: ``view`` is not a function, or it is a generator function.
    :raises ValueError: A limit is not a positive number, or ``wait`` is something else.
    """
    read_limits(max_workers, timeout)
    at_close = read_wait("wait", wait, ("return", "close")) == "close"

    if view is None:
        return functools.partial(
            scoped, max_workers=max_workers, timeout=timeout, wait=wait
        )

    _check_view(view)

    if inspect.iscoroutinefunction(view):

        @functools.wraps(view)
        async def async_view(*args: t.Any, **kwargs: t.Any) -> t.Any:
            async with Block(max_workers, timeout, at_close):
                return await view(*args, **kwargs)

        return async_view

    @functools.wraps(view)
    def sync_view(*args: t.Any, **kwargs: t.Any) -> t.Any:
        with Block(max_workers, timeout, at_close):
            return view(*args, **kwargs)

    return sync_view


def _check_view(view: t.Any) -> None:
    """Refuse what can't have a scope around it."""
    if not callable(view) or inspect.isclass(view):
        raise TypeError(
            f"scoped() takes a function, or limits by name, as in"
            f" @scoped(max_workers=2), not {view!r}."
        )

    if inspect.isgeneratorfunction(view) or inspect.isasyncgenfunction(view):
        raise TypeError(
            f"scoped() can't wait for {view!r}: its body runs after it has returned."
            " Use 'with open_scope()' in it."
        )


def find_holder() -> TaskScope | None:
    """Return the scope with whose success a task may start: in a task, that of it."""
    return _find_scope(holds=True)


def _find_scope(*, holds: bool = False) -> TaskScope | None:
    """Return the scope that a task goes to, and open the request's for the first one.

    ``None`` where a task is a plain call.

    :param holds: The task may wait for the success of what it is started in.
    """
    app_context = find_app_context()

    if app_context is None:
        return None

    app: Flask = app_context.app

    if holds and "apitask" in app.extensions:
        watch(app)

    request_context = find_request_context()
    request = request_context and request_context.request

    # The innermost frame counts that is part of this request, and of this app.
    for frame in walk_frames() if current_frame.get() else ():
        if request is None or frame.request is request:
            if holds and frame.task_of is not None and frame.app is app:
                return frame.task_of()

            if frame.scope is None or frame.app is app:
                return frame.scope

    if request_context is None or request_context.app is not app:
        return None

    state: AppState | None = app.extensions.get("apitask")

    if state is None or not state.config.enabled:
        return None

    scope = request_scope.find_request_scope(request_context)

    if holds:
        return scope.open_holding(app_context, request_context)

    return scope.open(app_context, request_context)
