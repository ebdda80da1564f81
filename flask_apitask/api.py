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
from .calling import call_observed
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
from .task_runner import PlainRunner
from .watching import watch

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from .context import Frame
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
    """Start a task that the current request or ``with`` block waits for.

    The task runs on a thread, in its own app context, with the caller's request and
    context variables. If it raises, the exception is logged and kept in the future; the
    response is not affected.

    Where there is no scope (outside a request, inside another task, or after the
    request's scope has ended), this is a plain call: the task is called at once, in the
    caller's own context, and its exceptions are raised to the caller.

    Don't use it for work that must survive the process, be retried, or take longer than
    the client will wait. Such work belongs in a task queue, and :data:`APITASK_ROUTES`
    can send tasks there by name.

    :param task: A callable, sync or ``async def``, or a :class:`Task`.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments. :func:`run` takes none for itself.
    :raises TypeError: ``task`` can't be called, or is the class of a :class:`Task`, or
        it is routed to Celery and JSON can't carry one of its arguments exactly.
    :return: A :class:`concurrent.futures.Future` of the task's result, already done
        after a plain call. An ``async def`` view may ``await`` it. If the task goes to
        Celery, the result is its :class:`celery.result.AsyncResult`.
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
    """Log a WARNING, once per app, in a request of an app without an :class:`ApiTask`.

    :param what: What was done in the request, to start the text.
    """
    request_context = None if "apitask" in app.extensions else find_request_context()

    if request_context is not None and request_context.app is app:
        log_once(
            app,
            "without_apitask",
            "%s in a request of %r, which has no ApiTask, so nothing ran in the"
            " background. Create one with ApiTask(app), or call its init_app(app).",
            what,
            app.name,
        )


def wait(timeout: float | None = None) -> None:
    """Block until the tasks submitted to the current scope so far are done.

    You can start more tasks afterwards. If a task fails, its exception goes to its
    future and to the log, and is not raised here. Does nothing where there is no scope.
    Don't call it at the end of a view: the request waits anyway.

    :param timeout: Maximum seconds to wait; ``None`` waits indefinitely.
    :raises TimeoutError: Some tasks are not done yet; they keep running.
    :raises TypeError: ``timeout`` is not a number.
    """
    if not isinstance(timeout, int | float | None):
        raise TypeError(f"wait() takes a number of seconds or None, not {timeout!r}.")

    scope = _find_scope()

    if scope is not None:
        scope.wait(timeout)


def current_scope() -> TaskScope | None:
    """Return the scope that :func:`run` submits to here, if there is one.

    A scope is an executor: ``loop.run_in_executor(current_scope(), ...)``.
    """
    scope = _find_scope()
    return None if scope is None or scope.closed else scope


@contextlib.contextmanager
def open_scope(
    *, max_workers: int | None = None, timeout: float | None = None
) -> cabc.Iterator[TaskScope]:
    """Open a scope for a block: in a command, a script, or part of a view.

    At its end, the block waits for the tasks started in it, whether it raises or not.
    Scopes nest: a task belongs to the innermost one, and each waits for its own tasks.

    :param max_workers: Maximum number of tasks that run at once; ``None`` means
        :data:`APITASK_MAX_WORKERS`.
    :param timeout: Maximum seconds that the block waits for its tasks; ``None`` means
        :data:`APITASK_TIMEOUT`, and :data:`math.inf` waits indefinitely.
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

    It waits for its tasks before it returns, not only at the end of the request. Use it
    to set other limits, or with ``APITASK_ENABLED = False`` to have scopes only where
    you want them. Put it below the route decorator, which registers the function below
    it::

        @app.post("/signup")
        @scoped(max_workers=2, timeout=5.0)
        def signup(): ...

    Above the route decorator it has no effect, because the app has already registered
    the view without it. This is wrong::

        @scoped(max_workers=2, timeout=5.0)
        @app.post("/signup")
        def signup(): ...

    In a class-based view, put it in ``decorators``, or on a method.

    :param view: A function, sync or ``async def``.
    :param max_workers: As for :func:`open_scope`.
    :param timeout: As for :func:`open_scope`.
    :param wait: When to wait for the tasks: ``"return"``, or in a request ``"close"``,
        which is after the response was sent.
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
    """Refuse an object that can't run inside a scope."""
    if not callable(view) or inspect.isclass(view):
        raise TypeError(
            f"scoped() takes a function, or keyword arguments as in"
            f" @scoped(max_workers=2), not {view!r}."
        )

    if inspect.isgeneratorfunction(view) or inspect.isasyncgenfunction(view):
        raise TypeError(
            f"scoped() can't wait for {view!r}: its body runs after it has returned."
            " Use 'with open_scope()' inside it."
        )


def find_holder() -> TaskScope | None:
    """Return the scope whose success a task waits for: in a task, the task's own."""
    app_context = find_app_context()

    if app_context is not None and "apitask" in app_context.app.extensions:
        watch(app_context.app)

    return find_task_scope() or _find_scope(holds=True)


def find_task_scope() -> TaskScope | None:
    """Return the scope of the task that the caller is in, while that scope exists."""
    app_context = find_app_context()
    app = None if app_context is None else app_context.app
    frame = _find_frame(app, find_request_context())

    if frame is None or frame.task_of is None or frame.app is not app:
        return None

    return frame.task_of()


def _find_scope(*, holds: bool = False) -> TaskScope | None:
    """Return the scope for a new task, and open the request's scope if need be.

    Return ``None`` where a task is a plain call.

    :param holds: The scope is for a task that waits for the scope's success.
    """
    app_context = find_app_context()

    if app_context is None:
        return None

    app: Flask = app_context.app
    request_context = find_request_context()

    # A fast path: most callers are neither in a task nor in a block.
    frame = _find_frame(app, request_context) if current_frame.get() else None

    if frame is not None:
        return frame.scope

    if request_context is None or request_context.app is not app:
        return None

    state: AppState | None = app.extensions.get("apitask")

    if state is None or not state.config.enabled:
        return None

    scope = request_scope.find_request_scope(request_context)
    make = scope.open_holding if holds else scope.open
    return make(app_context, request_context)


def _find_frame(app: Flask | None, request_context: t.Any) -> Frame | None:
    """Return the innermost frame that applies to the current request."""
    request = request_context and request_context.request

    for frame in walk_frames():
        if request is None or frame.request is request:
            if frame.scope is None or frame.app is app:
                return frame

    return None
