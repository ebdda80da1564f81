from __future__ import annotations

import contextlib
import time
import typing as t
import weakref
from types import FunctionType

from celery import shared_task
from celery.exceptions import TaskPredicate

from ..calling import call_observed
from ..context import current_frame
from ..context import find_app_context
from ..context import find_request_context
from ..context import Frame
from ..executor.task import all_names
from ..executor.task import find_named
from ..executor.task import naming_checks
from ..mail.sending import EXTENSIONS
from ..routes import is_for_celery
from ..task_log import log_failure
from .state import find_submitted
from .state import raises_to_caller

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import celery
    from flask import Flask

    from ..config import Routes

_NO_CONTEXT: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
# The routes of the apps that have some to Celery. No value may refer to the app that is
# its key, not even by way of a Celery app, or the app would stay alive.
_apps: weakref.WeakKeyDictionary[Flask, Routes] = weakref.WeakKeyDictionary()
# The names that Celery knows. It binds each to all its apps, even those made later. The
# tasks for mail are defined elsewhere.
_bound: set[str] = set(EXTENSIONS)


def bind_names(app: Flask, routes: Routes) -> None:
    """Register with Celery the functions that an app routes to it, now and later.

    :raises ValueError: Two functions share one of these names.
    """
    for name in all_names():
        if is_for_celery(routes, name):
            _bind(name, find_named(name))

    _apps[app] = routes


def _check_name(name: str, functions: list[FunctionType]) -> None:
    """Bind a name that a function is about to get; for :data:`.naming_checks`."""
    if any(is_for_celery(routes, name) for routes in _apps.values()):
        _bind(name, functions)


naming_checks.append(_check_name)


def _bind(name: str, functions: list[FunctionType]) -> None:
    places = dict.fromkeys(map(find_place, functions))

    if len(places) > 1:
        both = " and ".join(f"{path!r}, line {line}" for path, line in places)
        raise ValueError(
            f"Two functions have the name {name!r}, which APITASK_ROUTES sends to"
            f" Celery: in {both}. A worker could not tell which one to call. Rename one"
            " of them."
        )

    if functions and name not in _bound:
        _bound.add(name)
        # We log failures ourselves. Celery logs expected ones only at INFO.
        options = {"bind": True, "throws": (Exception,), "typing": False}
        shared_task(name=name, **options)(_make_call(name))


def find_place(fn: t.Any) -> tuple[str, int]:
    """Return where a function is defined, or a null place for any other callable."""
    if not isinstance(fn, FunctionType):
        return "", 0

    return fn.__code__.co_filename, fn.__code__.co_firstlineno


def _make_call(name: str) -> cabc.Callable[..., t.Any]:
    def call(self: celery.Task, /, *args: t.Any, **kwargs: t.Any) -> t.Any:
        # Looked up, not held: the function may be a closure that keeps an app alive.
        fn: t.Any = [_miss, *find_named(name)][-1]

        with app_context(self.app) as app:
            started = time.monotonic()
            submitted = find_submitted(self, started)

            try:
                return call_observed(app, "celery", submitted, fn, args, kwargs)
            except TaskPredicate:
                # The task's own way to ask for a retry, or to be ignored or rejected.
                raise
            except BaseException as error:
                if not raises_to_caller(self):
                    log_failure(app, fn, error, time.monotonic() - started)

                raise

    return call


def _miss(*args: t.Any, **kwargs: t.Any) -> t.NoReturn:
    """Stand in for a function that no longer exists."""
    raise RuntimeError(
        "The function with this name no longer exists. Define it at module level, or"
        " keep a reference to it for as long as its app lives."
    )


@contextlib.contextmanager
def app_context(celery_app: celery.Celery) -> cabc.Iterator[Flask]:
    """Push the context of a Celery app's Flask app, unless it is the current one.

    The task class in Flask's documentation pushes one already. In the block,
    :func:`.run` is a plain call.

    :raises RuntimeError: There is no such app in this process.
    """
    context = find_app_context()
    apps = [app for app in _apps if app.extensions.get("celery") is celery_app]

    if context is not None and context.app in apps:
        app, entered = context.app, _NO_CONTEXT
    elif apps:
        app, entered = apps[0], apps[0].app_context()
    else:
        raise RuntimeError(
            f"No Flask app in this process has {celery_app!r} in"
            " app.extensions['celery']. Create the worker's Celery app from the Flask"
            " app, with celery_init_app(app)."
        )

    with entered:
        request_context = find_request_context()
        request = request_context and request_context.request
        token = current_frame.set(Frame(app, None, request))

        try:
            yield app
        finally:
            current_frame.reset(token)
