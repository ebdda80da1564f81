from __future__ import annotations

import asyncio
import inspect
import time
import typing as t

from flask import has_request_context
from flask import request

from .context import task_context
from .signals import task_finished
from .signals import task_started
from .tasks import How
from .tasks import Job

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import contextvars

    import blinker
    from flask import Flask

T = t.TypeVar("T")


class InlineJob(Job[T]):
    """A task that runs where it is called, seen by the receivers of the signals.

    :param app: The sender of the signals; without one there are none.
    """

    __slots__ = ("_app", "_submitted")

    def __init__(
        self,
        app: Flask | None,
        task: t.Any,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
    ) -> None:
        super().__init__(task, args, kwargs)
        self._app = app
        self._submitted = time.monotonic()

    def __call__(self, how: How) -> T:
        if self._app is None or not (task_started.receivers or task_finished.receivers):
            return self._complete(how)

        fields: dict[str, t.Any] = {
            "name": self.name,
            "how": how,
            "submitted": self._submitted,
            "started": time.monotonic(),
        }
        notify(task_started, self._app, fields)
        fields["exception"] = None

        try:
            return self._complete(how)
        except BaseException as error:
            fields["exception"] = error
            raise
        finally:
            fields["finished"] = time.monotonic()
            notify(task_finished, self._app, fields)
            # The exception's traceback refers to this frame: no cycle through it.
            del fields

    def _complete(self, how: How) -> T:
        """Call the task, and run the coroutine if it returns one."""
        result = super().__call__(how)

        if not inspect.iscoroutine(result):
            return result

        run = asyncio.run if self._app is None else self._app.ensure_sync(_await)

        try:
            return t.cast("T", run(result))
        finally:
            result.close()


class BoundJob(InlineJob[T]):
    """A task for another thread: with its caller's context variables, and contained.

    What it raises is logged, once, before the scope puts it into the future.

    :param app: Whose context the task has.
    :param context: The task's own copy of the caller's context variables.
    """

    __slots__ = ("_context",)

    def __init__(
        self,
        app: Flask,
        context: contextvars.Context,
        task: t.Any,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
    ) -> None:
        super().__init__(app, task, args, kwargs)
        self._context = context

    def __call__(self, how: How) -> T:
        return self._context.run(self._contained, how)

    def _contained(self, how: How) -> T:
        app = t.cast("Flask", self._app)
        started = time.monotonic()

        try:
            with task_context(app):
                return super().__call__(how)
        except BaseException as error:
            duration = time.monotonic() - started
            log_failure(
                app, self.name, f"failed after {duration:.3f} s", error, duration
            )
            raise


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
