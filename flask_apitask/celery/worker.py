from __future__ import annotations

import contextlib
import time
import typing as t
import weakref
from types import FunctionType

from celery import shared_task
from celery.exceptions import TaskPredicate

from ..context import current_frame
from ..context import find_app_context
from ..context import find_request_context
from ..context import Frame
from ..executor.task import all_names
from ..executor.task import find_named
from ..executor.task import naming_checks
from ..runner import call_observed
from ..task_log import log_failure
from .state import find_submitted

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import celery
    from flask import Flask

    Takes: t.TypeAlias = cabc.Callable[[str], bool]

_NO_CONTEXT: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
# The apps that have routes to Celery, and which names each sends there.
_apps: weakref.WeakKeyDictionary[Flask, Takes] = weakref.WeakKeyDictionary()
# The names that Celery knows. It binds each to all of its apps, of now and later. Mail
# has one of its own.
_bound: set[str] = {"flask_mail.send"}


def bind_names(app: Flask, takes: Takes) -> None:
    """Have Celery know the named functions that an app routes to it, of now and later.

    :raises ValueError: Two functions have one of these names.
    """
    for name in all_names():
        if takes(name):
            _bind(name, find_named(name))

    _apps[app] = takes


def _check_name(name: str, functions: list[FunctionType]) -> None:
    """Bind a name that is about to be given; for :data:`.naming_checks`."""
    if any(takes(name) for takes in _apps.values()):
        _bind(name, functions)


naming_checks.append(_check_name)


def _bind(name: str, functions: list[FunctionType]) -> None:
    places = dict.fromkeys(map(find_place, functions))

    if len(places) > 1:
        both = " and ".join(f"{path!r}, line {line}" for path, line in places)
        raise ValueError(
            f"Two functions have the name {name!r}, which APITASK_ROUTES sends to"
            f" Celery: those in {both}. A worker would not know which one to call: give"
            " one of them another name."
        )

    if functions and name not in _bound:
        _bound.add(name)
        # What fails is logged by us, and Celery tells of an expected failure at INFO.
        options = {"bind": True, "throws": (Exception,), "typing": False}
        shared_task(name=name, **options)(_make_call(name))


def find_place(fn: t.Any) -> tuple[str, int]:
    """Return where a function is defined; nowhere for any other callable."""
    if not isinstance(fn, FunctionType):
        return "", 0

    return fn.__code__.co_filename, fn.__code__.co_firstlineno


def _make_call(name: str) -> cabc.Callable[..., t.Any]:
    def call(self: celery.Task, /, *args: t.Any, **kwargs: t.Any) -> t.Any:
        # Not held here: the function may be closed over an app that is gone.
        fn: t.Any = [_miss, *find_named(name)][-1]

        with app_context(self.app) as app:
            started = time.monotonic()
            submitted = find_submitted(self, started)

            try:
                return call_observed(app, "celery", submitted, fn, args, kwargs)
            except TaskPredicate:
                # Its own way to say: try again, ignore, reject.
                raise
            except BaseException as error:
                log_failure(app, fn, error, time.monotonic() - started)
                raise

    return call


def _miss(*args: t.Any, **kwargs: t.Any) -> t.NoReturn:
    """Stand for a function that is gone."""
    raise RuntimeError(
        "The function of this name is gone. Define it at the top of a module, or keep a"
        " reference to it for as long as its app lives."
    )


@contextlib.contextmanager
def app_context(celery_app: celery.Celery) -> cabc.Iterator[Flask]:
    """Push the context of the app that a Celery app belongs to, if it is not there yet.

    The base class for tasks in Flask's documentation pushes one. In the block,
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
            f"No Flask app of this process has {celery_app!r} in"
            " app.extensions['celery']. Make the Celery app of the worker from the app,"
            " with celery_init_app(app)."
        )

    with entered:
        request_context = find_request_context()
        request = request_context and request_context.request
        token = current_frame.set(Frame(app, None, request))

        try:
            yield app
        finally:
            current_frame.reset(token)
