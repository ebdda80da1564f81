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

    A request has succeeded when no exception has left the view, whatever an error
    handler made of it, and the response has a status below 400 after all functions for
    ``after_request``. If it is a stream, that has to end without an exception, too.
    What counts in :func:`open_scope` and :func:`scoped` is that the block, or the
    function, was left without an exception.

    The request waits for the task as for those of :func:`run`. The future of a task
    that is dropped is cancelled, and one INFO says why.

    In a task, it waits for the success of what that task was started in. Where there is
    no scope, this is :func:`run`: the task is called here and now.

    Not for a database: the view may fail to commit and go on. See
    :func:`run_on_commit`.

    :param task: As for :func:`run`, with its arguments.
    :raises TypeError: As for :func:`run`.
    :return: A future as that of :func:`run`. As long as the task is put off, to wait
        for it is a :exc:`RuntimeError`.
    """
    if routes.router is not None:
        task, args, kwargs = routes.router(task, args, kwargs)

    scope = find_holder()
    held = None if scope is None else scope.hold(task, args, kwargs, for_success=True)
    return run(task, *args, **kwargs) if held is None else held
