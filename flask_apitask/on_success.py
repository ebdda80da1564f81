from __future__ import annotations

import typing as t

from . import routes
from .api import find_holder
from .api import run

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .executor.future import TaskFuture
    from .executor.task import Task

P = t.ParamSpec("P")
T = t.TypeVar("T")


@t.overload
def run_on_success(
    task: cabc.Callable[P, cabc.Coroutine[t.Any, t.Any, T]],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> TaskFuture[T]: ...


@t.overload
def run_on_success(
    task: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> TaskFuture[T]: ...


@t.overload
def run_on_success(task: Task[T], /) -> TaskFuture[T]: ...


def run_on_success(task: t.Any, /, *args: t.Any, **kwargs: t.Any) -> TaskFuture[t.Any]:
    """Start a task once the current request has succeeded, and drop it otherwise.

    A request has succeeded if no exception left the view, not even one that an error
    handler answered, and the response has a status below 400 after all
    ``after_request`` functions. A streamed response must also end without an exception.
    In :func:`open_scope` and :func:`scoped`, the block or function has succeeded if no
    exception left it.

    The request waits for the task as it does with :func:`run`. If the task is dropped,
    its future is cancelled and one INFO record says why.

    In a task, the new task waits for the success of the request or block in which the
    outer one was started. Where there is no scope, this is :func:`run`: the task is
    called at once.

    Don't use it for a task that depends on a commit: a view may fail to commit and
    still succeed. See :func:`run_on_commit`.

    :param task: As for :func:`run`, with its arguments.
    :raises TypeError: As for :func:`run`.
    :return: A future, as for :func:`run`. Waiting for it while the task is deferred is
        a :exc:`RuntimeError`.
    """
    if routes.router is not None:
        task, args, kwargs = routes.router(task, args, kwargs)

    scope = find_holder()
    held = None if scope is None else scope.hold(task, args, kwargs, for_success=True)
    return run(task, *args, **kwargs) if held is None else held
