from __future__ import annotations

import gc
import os
import pathlib
import threading
import typing as t

import flask
import pytest
from flask import Flask

from flask_apitask import ApiTask
from flask_apitask import stack

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Seconds after which a test that waits for another thread has failed.
PATIENCE = 10.0


class AppFactory(t.Protocol):
    """Make an app with the extension; keywords are keys of its configuration."""

    def __call__(self, **config: t.Any) -> Flask: ...


@pytest.fixture
def make_app() -> AppFactory:
    def factory(**config: t.Any) -> Flask:
        flask_app = Flask(__name__)
        flask_app.config.update(config)
        ApiTask(flask_app)
        return flask_app

    return factory


@pytest.fixture(autouse=True)
def nothing_outlives_its_test() -> cabc.Iterator[None]:
    """No thread, no context and no socket is left behind by a test."""
    threads = set(threading.enumerate())
    sockets = _sockets()
    yield
    assert stack._block.get() is None, "a scope is left open"
    assert not flask.has_app_context(), "a context is left pushed"

    # An app takes its threads along as soon as nothing refers to it any more.
    gc.collect()

    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread} is left running"

    assert _sockets() <= sockets, "a socket is left open"


def _sockets() -> set[str]:
    """Return the open sockets of the process, where the system tells."""
    descriptors = pathlib.Path("/proc/self/fd")
    found = set()

    if descriptors.exists():
        for descriptor in descriptors.iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue

            if target.startswith("socket:"):
                found.add(target)

    return found
