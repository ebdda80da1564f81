from __future__ import annotations

import typing as t

from celery import states
from celery.result import EagerResult
from celery.utils import uuid

from ..calling import HandsOver
from ..executor.task import find_named
from ..executor.task import make_callable
from ..executor.task import task_name
from ..log import log_once
from .arguments import copy_arguments
from .state import find_celery
from .state import find_state
from .worker import find_place

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import celery.result

    from ..calling import Call
    from .state import CeleryState


class Handover(HandsOver):
    """A task that hands another one over to Celery, or runs it if that fails.

    :param fn: The function named by :func:`.task`.
    """

    def __init__(self, state: CeleryState, fn: cabc.Callable[..., t.Any]) -> None:
        self._state = state
        self.task_name: str = task_name(fn)
        self.__wrapped__ = fn

    def hand_over(self, call: Call) -> celery.result.AsyncResult:
        published = self._state.publish(
            call.app, self.task_name, call.args, call.kwargs, call.submitted
        )

        if published is not None:
            return published

        result = call.run_here(self.__wrapped__)
        return EagerResult(uuid(), result, states.SUCCESS, name=self.task_name)


def route(task: t.Any, args: tuple[t.Any, ...], kwargs: dict[str, t.Any]) -> t.Any:
    """Return the task and arguments to use instead; for :data:`.routes.router`."""
    found = None if isinstance(task, HandsOver) else find_state()

    if found is None:
        return task, args, kwargs

    app, state = found
    task = make_callable(task)
    name = task_name(task)

    if not state.takes(name):
        return task, args, kwargs

    # The same function may be defined several times, by an app factory for example.
    if find_place(task) not in map(find_place, find_named(name)):
        log_once(
            app,
            f"route_{name}",
            "Task %r stays on threads, although APITASK_ROUTES sends it to Celery. A"
            " worker only finds functions that have @task('...') as their outermost"
            " decorator, and the mail of an unpatched Flask-Mail.",
            name,
        )
        return task, args, kwargs

    find_celery(app, name)
    args, kwargs = copy_arguments(name, task, args, kwargs)
    return Handover(state, task), args, kwargs
