from __future__ import annotations

import abc
import contextvars
import inspect
import logging
import time
import typing as t
from types import AsyncGeneratorType
from types import CoroutineType
from types import GeneratorType

from flask import current_app

from .executor.task import task_name
from .log import find_logger
from .log import log
from .signals import task_finished
from .signals import task_started
from .task_log import warn_of_generator

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import blinker
    from flask import Flask

    from .executor.runner import How

    Fn = cabc.Callable[..., t.Any]


# The types of what a call returns when the function's body has not run yet.
LAZY: t.Final = (CoroutineType, GeneratorType, AsyncGeneratorType)


class Call(t.NamedTuple):
    """How a task is called; see :func:`call_observed`."""

    app: Flask
    how: How
    submitted: float
    args: tuple[t.Any, ...]
    kwargs: dict[str, t.Any]

    def run_here(self, task: Fn) -> t.Any:
        """Call a task in this way, on the current thread."""
        app, how, submitted, args, kwargs = self
        return call_observed(app, how, submitted, task, args, kwargs)


class HandsOver:
    """A task that hands another one over to run elsewhere, and sends no signals."""

    @abc.abstractmethod
    def hand_over(self, call: Call) -> t.Any:
        """Hand the task over, or run it here: ``call.run_here(task)``."""

    def __call__(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        return self.hand_over(Call(app, "thread", time.monotonic(), args, kwargs))


def call_observed(
    app: Flask | None,
    how: How,
    submitted: float,
    task: Fn,
    args: tuple[t.Any, ...],
    kwargs: dict[str, t.Any],
) -> t.Any:
    """Call a task between its two signals, and run its coroutine if it is async.

    :param app: The sender of the signals; without one, none are sent.
    :param submitted: Seconds of :func:`time.monotonic`.
    """
    if app is not None and isinstance(task, HandsOver):
        # The task that is handed over is observed where it runs.
        return task.hand_over(Call(app, how, submitted, args, kwargs))

    fields: dict[str, t.Any] = {}

    if app is not None and (task_started.receivers or task_finished.receivers):
        fields = {"name": task_name(task), "how": how, "submitted": submitted}
        fields |= {"args": args, "kwargs": kwargs, "started": time.monotonic()}
        notify(task_started, app, fields)
        fields |= {"exception": None, "result": None}

    try:
        result = task(*args, **kwargs)

        if isinstance(result, LAZY):
            result = run_body(app, task, result)

        fields["result"] = result
        return result
    except BaseException as error:
        fields["exception"] = error
        raise
    finally:
        if app is not None and "started" in fields:
            fields["finished"] = time.monotonic()
            notify(task_finished, app, fields)

        # The exception's traceback refers to this frame: avoid a reference cycle.
        del fields


def notify(signal: blinker.NamedSignal, app: Flask, fields: dict[str, t.Any]) -> None:
    """Send a signal. If a receiver raises, log that and go on."""
    try:
        signal.send(app, _async_wrapper=app.ensure_sync, **fields)
    except BaseException as error:
        log(
            find_logger(app),
            logging.ERROR,
            "A receiver of the signal %r failed.",
            signal.name,
            error=error,
        )


def run_body(app: Flask | None, task: Fn, result: t.Any) -> t.Any:
    """Run a coroutine to its end, or warn that a generator's body has not run."""
    if isinstance(result, CoroutineType):
        return _run_coroutine(app, result)

    # A function that is not a generator function may return a generator on purpose.
    is_generator = inspect.isgeneratorfunction(task) or inspect.isasyncgenfunction(task)

    if app is not None and is_generator:
        warn_of_generator(app, task)

    return result


def _run_coroutine(
    app: Flask | None, coroutine: CoroutineType[t.Any, t.Any, t.Any]
) -> t.Any:
    """Run a coroutine, on another thread if this one has a running event loop.

    It has one where an async task or async view makes a plain call.
    """
    # Slow to import, and most apps have no async tasks.
    import asyncio
    import concurrent.futures

    try:
        run = asyncio.run if app is None else app.ensure_sync(_finish)

        if not _has_event_loop():
            return run(coroutine)

        with concurrent.futures.ThreadPoolExecutor(1, "apitask-async") as executor:
            context = contextvars.copy_context()
            return executor.submit(context.run, run, coroutine).result()
    finally:
        coroutine.close()


async def _finish(coroutine: cabc.Awaitable[t.Any]) -> t.Any:
    return await coroutine


def _has_event_loop() -> bool:
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False

    return True
