from __future__ import annotations

import dataclasses
import time
import typing as t

from .binding import call_observed
from .binding import ContextBinding
from .context import Block
from .context import current_block
from .context import find_app_context
from .context import find_request_context
from .endings import keep
from .endings import SCOPE
from .exceptions import ScopeClosed
from .futures import TaskFuture
from .scope import TaskScope
from .tasks import make_callable

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import concurrent.futures

    from flask import Flask
    from flask import Request

    from .config import Config
    from .tasks import Task
    from .threads import Threads

P = t.ParamSpec("P")
T = t.TypeVar("T")


@dataclasses.dataclass(frozen=True)
class AppState:
    """What ``app.extensions["apitask"]`` holds. It does not refer to the app."""

    config: Config
    threads: Threads


def find_scope() -> TaskScope | None:
    """Return the scope that a task goes to, and open the request's at its first use.

    ``None`` where a task is a plain call.
    """
    app_context = find_app_context()

    if app_context is None:
        return None

    app: Flask = app_context.app
    request_context = find_request_context()

    if current_block.get() is not None:
        block = _find_block(app, request_context and request_context.request)

        if block is not None:
            return block.scope

    if request_context is None or request_context.app is not app:
        return None

    scope: TaskScope | None = getattr(request_context, SCOPE, None)

    if scope is not None:
        return scope

    return _open_request_scope(app, request_context)


def _open_request_scope(app: Flask, request_context: t.Any) -> TaskScope | None:
    state: AppState | None = app.extensions.get("apitask")

    if state is None or not state.config.enabled:
        return None

    config, threads = state.config, state.threads
    binding = ContextBinding(app, None, request_context.request)
    scope = TaskScope(threads, config.max_workers, config.timeout, binding)
    return keep(request_context, scope, threads.process)


@t.overload
def run(
    task: cabc.Callable[P, cabc.Coroutine[t.Any, t.Any, T]],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> concurrent.futures.Future[T]: ...


@t.overload
def run(
    task: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> concurrent.futures.Future[T]: ...


@t.overload
def run(task: Task[T], /) -> concurrent.futures.Future[T]: ...


def run(
    task: t.Any, /, *args: t.Any, **kwargs: t.Any
) -> concurrent.futures.Future[t.Any]:
    """Start a task that the current request, or ``with`` block, waits for.

    It runs on a thread, in an app context of its own, with the caller's request and
    context variables. What it raises is logged and kept in the future; the response
    is not touched.

    Where there is no scope (outside of a request, inside another task, after the
    request's scope was ended) the task is called here and now, in the caller's own
    context, and what it raises goes to the caller.

    Not for work that must survive the process, be retried, or take longer than the
    client cares to wait: that belongs in a task queue.

    :param task: A callable, sync or ``async def``, or a :class:`Task`.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments; none is taken by :func:`run` itself.
    :raises TypeError: ``task`` can't be called.
    :return: The future of what the task returns, finished already after a plain call.
    """
    scope = find_scope()

    if scope is not None:
        try:
            return scope.submit_call(task, args, kwargs)
        except ScopeClosed:
            pass

    task = make_callable(task)
    app_context = find_app_context()
    app = None if app_context is None else app_context.app
    future: TaskFuture[t.Any] = TaskFuture()
    submitted = time.monotonic()
    future.set_result(call_observed(app, "inline", submitted, task, args, kwargs))
    return future


def wait(timeout: float | None = None) -> None:
    """Block until the tasks that the current scope was given so far are done.

    A barrier, not an end: more can be started after it. What the tasks raised is in
    their futures and in the log, and is not raised here. Does nothing where there is
    no scope. Not needed at the end of a view: the request waits by itself.

    :param timeout: Seconds to wait at most, ``None`` for as long as it takes.
    :raises TimeoutError: Some are not done yet; they go on.
    """
    scope = find_scope()

    if scope is not None:
        scope.wait(timeout)


def current_scope() -> TaskScope | None:
    """Return the scope that :func:`run` submits to here, if there is one.

    Use it as the executor that it is: ``loop.run_in_executor(current_scope(), ...)``.
    """
    scope = find_scope()
    return None if scope is None or scope.closed else scope


def open_block(
    app: Flask, max_workers: int, timeout: float | None
) -> tuple[Block, TaskScope]:
    """Open a scope for a ``with`` block."""
    request_context = find_request_context()
    request = request_context and request_context.request
    state: AppState = app.extensions["apitask"]
    binding = ContextBinding(app, None, request)
    scope = TaskScope(state.threads, max_workers, timeout, binding)
    block = Block(app, scope, request, current_block.get())
    current_block.set(block)
    return block, scope


def leave_block(block: Block) -> None:
    """Take a block off the stack, and what was left open in it."""
    inner = current_block.get()

    while inner is not None and inner is not block:
        inner = inner.outer

    # It is not there where a generator is closed in another context than it ran in.
    if inner is not None:
        current_block.set(block.outer)


def is_in_task() -> bool:
    """Return whether a task of the current request is what calls."""
    request_context = find_request_context()
    request = request_context and request_context.request
    block = current_block.get()

    while block is not None:
        if block.scope is None and block.request is request:
            return True

        block = block.outer

    return False


def _find_block(app: Flask, request: Request | None) -> Block | None:
    """Return the innermost block that may be seen from here."""
    block = current_block.get()

    while block is not None:
        in_sight = request is None or block.request is request

        if in_sight and (block.scope is None or block.app is app):
            break

        block = block.outer

    return block
