from __future__ import annotations

import dataclasses
import functools
import time
import typing as t

from .context import Block
from .context import current_block
from .context import find_app_context
from .context import find_request_context
from .exceptions import ScopeClosed
from .futures import TaskFuture
from .jobs import BoundJob
from .jobs import call_observed
from .scope import TaskScope
from .tasks import check_task

if t.TYPE_CHECKING:
    import concurrent.futures

    from flask import Flask
    from flask import Request

    from .config import Config
    from .threads import Threads


@dataclasses.dataclass(frozen=True)
class AppState:
    """What ``app.extensions["apitask"]`` holds. It does not refer to the app."""

    config: Config
    threads: Threads


# The scope of a request is kept on its app context, by its request context. A copy of
# these contexts, in another thread or in the same, has another request context; so has
# a nested request. Neither sees the scope, ends it or waits for it. A context variable
# that an asyncio task of an async view sets, to open it, would be lost to the request.
#
# The value is a dict, or None once the app context was torn down.
SCOPES = "_flask_apitask_scopes"


def current_scope() -> TaskScope | None:
    """Return the scope that a task goes to, and open the request's at its first use.

    ``None`` where a task is a plain call.
    """
    app_context = find_app_context()

    if app_context is None:
        return None

    request_context = find_request_context()

    if current_block.get() is not None:
        block = _find_block(
            app_context.app, request_context and request_context.request
        )

        if block is not None:
            return block.scope

    scopes = vars(app_context).get(SCOPES) or {}
    scope: TaskScope | None = scopes.get(request_context)

    if scope is not None:
        return scope

    return _open_request_scope(app_context, request_context)


def _open_request_scope(app_context: t.Any, request_context: t.Any) -> TaskScope | None:
    app: Flask = app_context.app

    if request_context is None or request_context.app is not app:
        return None

    state: AppState | None = app.extensions.get("apitask")

    if state is None or not state.config.enabled:
        return None

    scopes = vars(app_context).setdefault(SCOPES, {})

    if scopes is None:
        return None

    # Another thread with the very same contexts may come first. Then its scope is the
    # request's, and ours has never been used.
    config = state.config
    scope = _make_scope(
        app, config.max_workers, config.timeout, request_context.request
    )
    return t.cast("TaskScope", scopes.setdefault(request_context, scope))


def run_task(
    task: t.Any, args: tuple[t.Any, ...], kwargs: dict[str, t.Any]
) -> concurrent.futures.Future[t.Any]:
    """Submit a task to the current scope, or call it here and now."""
    scope = current_scope()

    if scope is not None:
        try:
            return scope.submit(task, *args, **kwargs)
        except ScopeClosed:
            pass

    check_task(task)
    app_context = find_app_context()
    app = None if app_context is None else app_context.app
    future: TaskFuture[t.Any] = TaskFuture()
    submitted = time.monotonic()
    future.set_result(call_observed(app, "inline", submitted, task, args, kwargs))
    return future


def open_block(
    app: Flask, max_workers: int, timeout: float | None
) -> tuple[Block, TaskScope]:
    """Open a scope for a ``with`` block."""
    request_context = find_request_context()
    request = request_context and request_context.request
    scope = _make_scope(app, max_workers, timeout, request)
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


def _find_block(app: Flask, request: Request | None) -> Block | None:
    """Return the innermost block that may be seen from here."""
    block = current_block.get()

    while block is not None:
        in_sight = request is None or block.request is request

        if in_sight and (block.scope is None or block.app is app):
            break

        block = block.outer

    return block


def _make_scope(
    app: Flask, max_workers: int, timeout: float | None, request: Request | None
) -> TaskScope:
    state: AppState = app.extensions["apitask"]
    bind = functools.partial(BoundJob, app, Block(app, None, request))
    return TaskScope(state.threads, max_workers=max_workers, timeout=timeout, bind=bind)
