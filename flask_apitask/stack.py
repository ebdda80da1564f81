from __future__ import annotations

import concurrent.futures
import contextvars
import dataclasses
import enum
import functools
import os
import typing as t

from flask import g
from flask import has_request_context
from flask import request

from .context import find_app
from .context import find_app_context
from .context import find_request_context
from .exceptions import ScopeClosed
from .jobs import BoundJob
from .jobs import InlineJob
from .jobs import log_failure
from .scope import TaskScope
from .tasks import check_task

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from .config import Config
    from .scope import Overdue
    from .scope import Threads


@dataclasses.dataclass(frozen=True)
class AppState:
    """What ``app.extensions["apitask"]`` holds. It does not refer to the app."""

    config: Config
    threads: Threads


class _Mark(enum.Enum):
    # On top of the stack inside a task and in a forked child: run() is a plain call.
    PLAIN = "plain"


class Entry:
    """A scope on the stack of those that are open in a context.

    :param request_context: What Flask had pushed for the request, if anything. Another
        request, or a copy of this one in another thread, does not see the scope.
    :param owners: Whose end ends the scope: the request's contexts, or the ``with``
        block, which the scope itself stands for.
    """

    __slots__ = ("app", "owners", "previous", "request_context", "scope")

    def __init__(
        self,
        app: Flask,
        scope: TaskScope,
        request_context: object | None,
        owners: tuple[object, ...],
    ) -> None:
        self.app = app
        self.scope = scope
        self.request_context = request_context
        self.owners = owners
        self.previous = _stack.get()


Top: t.TypeAlias = Entry | t.Literal[_Mark.PLAIN] | None

# The innermost open scope. It is found by what Flask has pushed, too, and not by this
# alone: a nested request, and a thread that was given a copy of the context variables,
# have this very value and must not use it.
_stack: contextvars.ContextVar[Top] = contextvars.ContextVar(
    "flask_apitask", default=None
)


def open_scope(
    app: Flask,
    *,
    max_workers: int,
    timeout: float | None,
    request_context: object | None,
    owners: tuple[object, ...] = (),
) -> TaskScope:
    """Open a scope on top of the stack.

    :param owners: See :class:`Entry`; by default the scope itself.
    """
    state: AppState = app.extensions["apitask"]
    bind = functools.partial(_bind, app)
    scope = TaskScope(
        state.threads, max_workers=max_workers, timeout=timeout, bind=bind
    )
    _stack.set(Entry(app, scope, request_context, owners or (scope,)))
    return scope


def open_request_scope() -> None:
    """Open the scope of a request, unless an earlier function ran a task already."""
    app = t.cast("Flask", find_app())
    context = find_request_context()
    top = _stack.get()

    if not isinstance(top, Entry) or top.request_context is not context:
        _open_for_request(app, context)


def end_request_scope(exc: BaseException | None) -> None:
    """End the request's scope; for :meth:`flask.Flask.teardown_request`."""
    end(pop(find_request_context()))


def end_app_context_scope(exc: BaseException | None) -> None:
    """End a scope that :func:`end_request_scope` did not come to end.

    For :meth:`flask.Flask.teardown_appcontext`. Before Flask 3.2, a function registered
    for ``teardown_request`` that raises keeps those registered before it from running.
    """
    end(pop(find_app_context()))

    if has_request_context():
        # From Flask 3.2 on the request is still visible to what is torn down after
        # this. Nobody would end a scope that it opened.
        g._apitask_ended = True


def run_task(
    task: t.Any, args: tuple[t.Any, ...], kwargs: dict[str, t.Any]
) -> concurrent.futures.Future[t.Any]:
    """Submit a task to the current scope, or call it here and now."""
    app = find_app()
    scope = None if app is None else _scope_for_run(app)

    if scope is not None:
        try:
            return scope.submit(task, *args, **kwargs)
        except ScopeClosed:
            pass

    check_task(task)
    future: concurrent.futures.Future[t.Any] = concurrent.futures.Future()
    future.set_result(InlineJob[t.Any](app, task, args, kwargs)("inline"))
    return future


def accepts_tasks() -> bool:
    """Tell whether a task would be submitted here, and not be a plain call."""
    app = find_app()
    scope = None if app is None else _scope_for_run(app)
    return scope is not None and not scope.closed


def _scope_for_run(app: Flask) -> TaskScope | None:
    """Return the current scope; open the request's if nothing did so before.

    ``None`` where a task is a plain call.
    """
    context = find_request_context()
    entry = _find(app, context)

    if isinstance(entry, Entry):
        return entry.scope

    if entry is _Mark.PLAIN or context is None or context.app is not app:
        return None

    state: AppState | None = app.extensions.get("apitask")

    if state is None or not state.config.enabled or "_apitask_ended" in g:
        return None

    return _open_for_request(app, context)


def _open_for_request(app: Flask, request_context: object) -> TaskScope:
    config = app.extensions["apitask"].config
    return open_scope(
        app,
        max_workers=config.max_workers,
        timeout=config.timeout,
        request_context=request_context,
        owners=(request_context, find_app_context()),
    )


def current_entry() -> Entry | None:
    """Return the innermost entry that may be seen from here, if there is one."""
    app = find_app()
    entry = None if app is None else _find(app, find_request_context())
    return entry if isinstance(entry, Entry) else None


def _find(app: Flask, request_context: object | None) -> Top:
    """Return the innermost entry that may be seen from here, or the stack's bottom."""
    entry = _stack.get()

    while isinstance(entry, Entry):
        if entry.app is app and request_context in (None, entry.request_context):
            break

        entry = entry.previous

    return entry


def _bind(
    app: Flask, task: t.Any, args: tuple[t.Any, ...], kwargs: dict[str, t.Any]
) -> BoundJob[t.Any]:
    context = contextvars.copy_context()
    context.run(_stack.set, _Mark.PLAIN)
    return BoundJob(app, context, task, args, kwargs)


def pop(owner: object) -> list[Entry]:
    """Take the entries of an owner off the stack, with all that lie above them."""
    entries: list[Entry] = []
    popped = 0
    entry = _stack.get()

    while isinstance(entry, Entry):
        entries.append(entry)
        entry = entry.previous

        if owner in entries[-1].owners:
            popped = len(entries)
            _stack.set(entry)

    return entries[:popped]


def end(entries: cabc.Iterable[Entry]) -> None:
    """Wait for the scopes of popped entries, and log what is overdue."""
    for entry in entries:
        overdue = entry.scope.end()

        if overdue is not None:
            _report(entry.app, overdue)


def _report(app: Flask, overdue: Overdue) -> None:
    """Log what a scope left behind at its deadline."""
    for name in overdue.cancelled:
        log_failure(
            app, name, f"was cancelled: not begun within {overdue.timeout} s", None, 0.0
        )

    if overdue.running:
        app.logger.warning(
            "Went on without %d task(s) not done after %s s. They are in:\n\n%s",
            len(overdue.running),
            overdue.timeout,
            "\n".join(f"{name!r}:\n{stack}" for name, stack in overdue.running),
            extra={
                "action": "apitask",
                "task_names": [name for name, _ in overdue.running],
                "endpoint": request.endpoint if has_request_context() else None,
            },
        )


def _forget_parent() -> None:
    """In a forked child, leave the scopes to the parent, which has their threads."""
    if _stack.get() is not None:
        _stack.set(_Mark.PLAIN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
