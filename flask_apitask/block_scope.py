from __future__ import annotations

import typing as t

from flask import current_app

from . import request_scope
from .closing import raise_error
from .config import Config
from .config import read_count
from .config import read_timeout
from .context import current_frame
from .context import find_request_context
from .context import Frame
from .context import is_in_task
from .context import walk_frames
from .outcome import find_failure
from .task_runner import TaskRunner
from .watching import watch_responses

if t.TYPE_CHECKING:
    from flask import Flask

    from .executor.scope import TaskScope


class Block:
    """Gives a block of code or a function a scope, and waits for it at the end.

    :param at_close: End the scope when the response closes, if there is a response.
    """

    def __init__(
        self, max_workers: int | None, timeout: float | None, at_close: bool = False
    ) -> None:
        self._limits = max_workers, timeout
        self._at_close = at_close

    def __enter__(self) -> TaskScope:
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]

        if "apitask" not in app.extensions:
            raise RuntimeError(
                f"There is no 'ApiTask' on the current Flask app {app.name!r}. Create"
                " one with ApiTask(app), or call its init_app(app)."
            )

        config, pool = app.extensions["apitask"]
        request_context = find_request_context()
        request = request_context and request_context.request
        limits = read_limits(*self._limits, config)

        if request_context is not None:
            request_scope.prepare(request_context, config)

        runner = TaskRunner(app, request, config.copy_g)
        self._scope = runner.make_scope(pool, *limits)
        self._frame = Frame(app, self._scope, request, current_frame.get())
        current_frame.set(self._frame)
        return self._scope

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> None:
        if self._leave(error):
            raise_error(self._scope.end())

    async def __aenter__(self) -> TaskScope:
        return self.__enter__()

    async def __aexit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> None:
        if self._leave(error):
            # Only an app with such a view needs asyncio, which is slow to import.
            import asyncio

            # On another thread, because the tasks may need the view's event loop.
            raise_error(await asyncio.to_thread(self._scope.end))

    def _leave(self, error: BaseException | None) -> bool:
        """Leave the block and any left open in it; tell whether the scope ends now."""
        frame = self._frame
        self._scope.settle(find_failure(error))

        # A generator may be closed in another context than it ran in, and then this
        # frame is not among those of the caller.
        if frame in walk_frames():
            current_frame.set(frame.parent)

        context = find_request_context() if self._at_close else None

        # A function called by a task has nothing to do with the response.
        if context and context.app is frame.app and not is_in_task(context.request):
            watch_responses(frame.app)
            request_scope.find_request_scope(context).defer(self._scope)
            return False

        return True


def read_limits(
    max_workers: int | None, timeout: float | None, config: Config | None = None
) -> tuple[int, float | None]:
    """Read the limits of a block; ``None`` stands for the configured limit."""
    default = config or Config()
    return (
        default.max_workers
        if max_workers is None
        else read_count("max_workers", max_workers),
        default.timeout if timeout is None else read_timeout("timeout", timeout),
    )
