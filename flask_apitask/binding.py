from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import time
import typing as t
from types import CoroutineType

from flask import has_request_context
from flask import request

from .context import Block
from .context import current_block
from .context import task_context
from .signals import task_finished
from .signals import task_started
from .tasks import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import blinker
    from flask import Flask

    from .jobs import Job
    from .jobs import Overdue
    from .threads import How

T = t.TypeVar("T")


class ContextBinding(Block):
    """Gives each task of a scope an app context of its own, and is their block.

    What a task raises is logged, once, before it is raised to the future.
    """

    __slots__ = ()

    def call(self, job: Job[t.Any], how: How) -> t.Any:
        """Call a job's task in a context, observed and contained."""
        app = self.app
        started = time.monotonic()
        current_block.set(self)

        try:
            with task_context(app):
                return call_observed(
                    app, how, job.submitted, job.task, job.args, job.kwargs
                )
        except BaseException as error:
            duration = time.monotonic() - started
            message = f"failed after {duration:.3f} s"
            log_failure(app, task_name(job.task), message, error, duration)
            raise

    def report(self, overdue: Overdue) -> None:
        """Log it: an ERROR for each task that never ran, a WARNING for the others."""
        app = self.app

        for name in overdue.cancelled:
            message = f"was cancelled: not begun within {overdue.timeout} s"
            log_failure(app, name, message, None, 0.0)

        if overdue.running:
            app.logger.warning(
                "Went on without %d task(s) not done after %s s. Tasks like that hold"
                " %d thread(s) of the app now. These are in:\n\n%s",
                len(overdue.running),
                overdue.timeout,
                overdue.held,
                "\n".join(f"{name!r}:\n{stack}" for name, stack in overdue.running),
                extra={
                    "action": "apitask",
                    "task_names": [name for name, _ in overdue.running],
                    "overdue_threads": overdue.held,
                    "endpoint": find_endpoint(),
                },
            )


def call_observed(
    app: Flask | None,
    how: How,
    submitted: float,
    task: cabc.Callable[..., t.Any],
    args: tuple[t.Any, ...],
    kwargs: dict[str, t.Any],
) -> t.Any:
    """Call a task between its two signals.

    :param app: The sender; without one there are no signals.
    :param submitted: Seconds of the monotonic clock.
    """
    if app is None or not (task_started.receivers or task_finished.receivers):
        result = task(*args, **kwargs)
        return _complete(app, result) if isinstance(result, CoroutineType) else result

    fields: dict[str, t.Any] = {
        "name": task_name(task),
        "how": how,
        "submitted": submitted,
        "started": time.monotonic(),
    }
    notify(task_started, app, fields)
    fields["exception"] = None

    try:
        result = task(*args, **kwargs)
        return _complete(app, result) if isinstance(result, CoroutineType) else result
    except BaseException as error:
        fields["exception"] = error
        raise
    finally:
        fields["finished"] = time.monotonic()
        notify(task_finished, app, fields)
        # The exception's traceback refers to this frame: no cycle through it.
        del fields


def _complete(app: Flask | None, coroutine: CoroutineType[t.Any, t.Any, T]) -> T:
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
