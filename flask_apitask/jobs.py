from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import time
import typing as t

from flask import has_request_context
from flask import request

from .context import current_block
from .context import task_context
from .scope import Job
from .signals import task_finished
from .signals import task_started
from .tasks import call_task
from .tasks import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import types

    import blinker
    from flask import Flask

    from .context import Block
    from .threads import How

T = t.TypeVar("T")


class BoundJob(Job[T]):
    """A job with its caller's context variables and an app context of its own.

    What it raises is logged, once, before it is put into the future.

    :param app: Whose context it is, and who sends the signals.
    :param inside: Marks that what the task calls is inside of it.
    """

    __slots__ = ("_app", "_context", "_inside", "_submitted")

    def __init__(
        self,
        app: Flask,
        inside: Block,
        task: t.Any,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
    ) -> None:
        super().__init__(task, args, kwargs)
        self._app = app
        self._inside = inside
        self._context = contextvars.copy_context()
        self._submitted = time.monotonic()

    def call(self, how: How) -> T:
        """Call the task in its context, observed and contained."""
        # A context variable may refer to anything, and the job is kept until the scope
        # has counted it as done.
        context = self._context
        del self._context
        return context.run(self._call, how)

    def _call(self, how: How) -> T:
        started = time.monotonic()
        current_block.set(self._inside)

        try:
            with task_context(self._app):
                result: T = call_observed(
                    self._app, how, self._submitted, self.task, self.args, self.kwargs
                )
                return result
        except BaseException as error:
            duration = time.monotonic() - started
            message = f"failed after {duration:.3f} s"
            log_failure(self._app, task_name(self.task), message, error, duration)
            raise


def call_observed(
    app: Flask | None,
    how: How,
    submitted: float,
    task: t.Any,
    args: tuple[t.Any, ...],
    kwargs: dict[str, t.Any],
) -> t.Any:
    """Call a task between its two signals.

    :param app: The sender; without one there are no signals.
    :param submitted: Seconds of the monotonic clock.
    """
    if app is None or not (task_started.receivers or task_finished.receivers):
        result = call_task(task, args, kwargs)
        return _complete(app, result) if inspect.iscoroutine(result) else result

    fields: dict[str, t.Any] = {
        "name": task_name(task),
        "how": how,
        "submitted": submitted,
        "started": time.monotonic(),
    }
    notify(task_started, app, fields)
    fields["exception"] = None

    try:
        result = call_task(task, args, kwargs)
        return _complete(app, result) if inspect.iscoroutine(result) else result
    except BaseException as error:
        fields["exception"] = error
        raise
    finally:
        fields["finished"] = time.monotonic()
        notify(task_finished, app, fields)
        # The exception's traceback refers to this frame: no cycle through it.
        del fields


def _complete(app: Flask | None, coroutine: types.CoroutineType[t.Any, t.Any, T]) -> T:
    """Run what an ``async def`` task returned."""
    try:
        run = asyncio.run if app is None else app.ensure_sync(_await)
        return t.cast("T", _call_off_loop(run, coroutine))
    finally:
        coroutine.close()


def _call_off_loop(run: cabc.Callable[[t.Any], T], coroutine: object) -> T:
    """Run a coroutine, on another thread if this one has an event loop that runs.

    So it is where an async view waits, and helps, and where an async task runs another.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run(coroutine)

    with concurrent.futures.ThreadPoolExecutor(1, "apitask-async") as executor:
        context = contextvars.copy_context()
        return executor.submit(context.run, run, coroutine).result()


def log_failure(
    app: Flask, name: str, message: str, error: BaseException | None, duration: float
) -> None:
    """Write the one ERROR record of a task that failed, in the current context.

    :param message: What happened to the task, as in ``"Task 'x' <message>."``.
    :param duration: Seconds that it ran.
    """
    app.logger.error(
        "Task %r %s.",
        name,
        message,
        exc_info=error,
        extra={
            "action": "apitask",
            "task_name": name,
            "endpoint": find_endpoint(),
            "duration": duration,
        },
    )


def find_endpoint() -> str | None:
    """Return the endpoint of the current request, for the log."""
    return request.endpoint if has_request_context() else None


async def _await(coroutine: cabc.Coroutine[t.Any, t.Any, T]) -> T:
    return await coroutine


def notify(signal: blinker.NamedSignal, app: Flask, fields: dict[str, t.Any]) -> None:
    """Send a signal; a receiver that raises is logged, and the task goes on."""
    try:
        signal.send(app, _async_wrapper=app.ensure_sync, **fields)
    except Exception:
        app.logger.exception("A receiver of the signal %r failed.", signal.name)
