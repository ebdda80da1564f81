from __future__ import annotations

import threading
import typing as t

from conftest import PATIENCE

from flask_apitask.executor.pool import ThreadPool

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

T = t.TypeVar("T")


def make_late(app: Flask) -> Flask:
    """Take the threads from an app, so that only a wait gets its tasks done.

    What its tasks did is then what somebody waited for, and done at that moment: a
    test need not catch a thread that is quicker than a wait that is missing.
    """
    state = app.extensions["apitask"]
    app.extensions["apitask"] = state._replace(pool=ThreadPool(0))
    return app


def note_return(app: Flask, events: list[str]) -> None:
    """Note ``"returned"`` whenever the WSGI callable of an app returns or raises."""
    inner = app.wsgi_app

    def outer(environ: t.Any, start_response: t.Any) -> t.Any:
        try:
            return inner(environ, start_response)
        finally:
            events.append("returned")

    app.wsgi_app = outer  # type: ignore[method-assign]


def in_time(fn: cabc.Callable[..., T], *args: t.Any) -> T:
    """Call a function on a thread, and return its result if there is one in time."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(fn(*args)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"{fn} has not returned after {PATIENCE} s"
    return results[0]
