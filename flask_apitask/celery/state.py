from __future__ import annotations

import os
import typing as t

from ..context import find_app_context
from ..context import find_request_context
from ..context import is_in_task
from ..log import find_logger
from ..log import log_once
from ..routes import is_for_celery
from .broker import Broker

if t.TYPE_CHECKING:
    import celery
    import celery.result
    from flask import Flask

    from ..config import Config

# The headers that tell an eager task when it was submitted, and whether its exception
# reaches the caller.
_SUBMITTED: t.Final = "apitask_submitted"
_RAISES: t.Final = "apitask_raises"
_PICKLE: t.Final = {"pickle", "application/x-python-serialize"}


class CeleryState:
    """What ``app.extensions["apitask_celery"]`` holds. It does not refer to the app."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # By process and Celery app. An entry is added atomically and never changed.
        self._brokers: dict[tuple[int, celery.Celery], Broker] = {}

    def takes(self, name: str) -> bool:
        """Tell whether tasks of this name go to Celery."""
        return is_for_celery(self.config.routes, name)

    def publish(
        self,
        app: Flask,
        name: str,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        submitted: float,
        **options: t.Any,
    ) -> celery.result.AsyncResult | None:
        """Publish a task of an app. Return ``None`` if it has to run here.

        :param submitted: Seconds of this process's clock, useless in another process.
        """
        celery_app = find_celery(app, name)
        task = celery_app.tasks[name]

        if celery_app.conf.task_always_eager:
            # As apply_async() does. But that also sets a global flag for the duration:
            # while it is set, no view can get a result, and two threads at once may
            # leave it set for ever.
            propagate = self.config.propagate
            raises = bool(propagate or celery_app.conf.task_eager_propagates)
            headers = {_SUBMITTED: submitted, _RAISES: raises}
            result = task.apply(args, kwargs, headers=headers, **options)

            # Not with apply(throw=True): that would raise an attempt's Retry, too.
            if propagate and result.failed():
                raise result.result

            return result

        broker = self._find_broker(app, celery_app)
        return broker.publish(find_logger(app), task, args, kwargs, **options)

    def close(self) -> None:
        """Close this process's connections to brokers, after a test for example."""
        for (pid, _), broker in self._brokers.items():
            if pid == os.getpid():
                broker.close()

    def _find_broker(self, app: Flask, celery_app: celery.Celery) -> Broker:
        key = os.getpid(), celery_app

        if key not in self._brokers:
            self._warn_once(app, celery_app.conf)
            broker = Broker(celery_app, self.config.celery_timeout)
            return self._brokers.setdefault(key, broker)

        return self._brokers[key]

    @staticmethod
    def _warn_once(app: Flask, settings: t.Any) -> None:
        """Warn about Celery settings that are unsafe or don't work here."""
        if _PICKLE & set(settings.accept_content):
            log_once(
                app,
                "pickle",
                "The Celery app accepts pickle, so anyone who can write to its broker"
                " can run code in its workers. Remove pickle from accept_content.",
            )

        if str(settings.result_backend).startswith("rpc") and not (
            settings.task_ignore_result
        ):
            log_once(
                app,
                "rpc",
                "The result backend rpc:// sends results to the thread that published"
                " the task, which is not the view's: AsyncResult.get() would wait for"
                " ever. Set result_backend to a store such as Redis, or set"
                " task_ignore_result.",
            )


def find_submitted(task: celery.Task, started: float) -> float:
    """Return when a task was submitted: when it started, unless it is eager."""
    submitted: float = _find_header(task, _SUBMITTED, started)
    return submitted


def raises_to_caller(task: celery.Task) -> bool:
    """Tell whether a task's exception reaches its caller, which then logs it."""
    raises: bool = _find_header(task, _RAISES, False)
    return raises


def _find_header(task: celery.Task, name: str, default: object) -> t.Any:
    headers = task.request.headers if task.request.is_eager else None
    return (headers or {}).get(name, default)


def find_celery(app: Flask, name: str) -> celery.Celery:
    """Return the Celery app of a Flask app.

    :raises RuntimeError: It has none.
    """
    celery_app = app.extensions.get("celery")

    if celery_app is None:
        raise RuntimeError(
            f"Task {name!r} is routed to Celery (APITASK_ROUTES), but the app"
            f" {app.name!r} has no Celery app in app.extensions['celery']. Create one"
            " with celery_init_app(app), as Flask's documentation does:"
            " https://flask.palletsprojects.com/patterns/celery/"
        )

    return celery_app


def find_state() -> tuple[Flask, CeleryState] | None:
    """Return the current app and its Celery state where a task may be handed over.

    In a task, and so in a worker, every task is a plain call.
    """
    context = find_app_context()

    if context is None or "apitask_celery" not in context.app.extensions:
        return None

    request_context = find_request_context()

    if is_in_task(request_context and request_context.request):
        return None

    return context.app, context.app.extensions["apitask_celery"]
