from __future__ import annotations

import typing as t

from flask import current_app

from . import request_scope
from .config import Config
from .config import read_count
from .config import read_timeout
from .context import current_frame
from .context import find_request_context
from .context import Frame
from .context import is_in_task
from .context import walk_frames
from .runner import TaskRunner

if t.TYPE_CHECKING:
    from flask import Flask

    from .executor.scope import TaskScope


def enter(max_workers: int | None, timeout: float | None) -> tuple[Frame, TaskScope]:
    """Open the scope of a ``with`` block, or of a decorated function."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]

    if "apitask" not in app.extensions:
        raise RuntimeError(
            f"There is no 'ApiTask' on the current Flask app {app.name!r}. Create one"
            " with ApiTask(app), or call its init_app(app)."
        )

    config, pool = app.extensions["apitask"]
    request_context = find_request_context()
    request = request_context and request_context.request
    limits = read_limits(max_workers, timeout, config)

    if request_context is not None:
        request_scope.prepare(request_context, config)

    runner = TaskRunner(app, request, config.copy_g)
    scope = runner.make_scope(pool, *limits)
    frame = Frame(app, scope, request, current_frame.get())
    current_frame.set(frame)
    return frame, scope


def leave(frame: Frame, scope: TaskScope, at_close: bool = False) -> bool:
    """Leave a block and those left open in it, and return whether its scope ends now.

    :param at_close: End it with the response, if there is going to be one.
    """
    # It is not there where a generator is closed in another context than it ran in.
    if frame in walk_frames():
        current_frame.set(frame.parent)

    context = find_request_context()

    # A function that is called by a task has nothing to do with the response.
    if not at_close or context is None or is_in_task(context.request):
        return True

    if context.app is not frame.app:
        return True

    request_scope.watch_responses(frame.app)
    request_scope.find_request_scope(context).defer(scope)
    return False


def read_limits(
    max_workers: int | None, timeout: float | None, config: Config | None = None
) -> tuple[int, float | None]:
    """Read the limits of a block, by the configuration where they are ``None``."""
    default = config or Config()
    return (
        default.max_workers
        if max_workers is None
        else read_count("max_workers", max_workers),
        default.timeout if timeout is None else read_timeout("timeout", timeout),
    )
