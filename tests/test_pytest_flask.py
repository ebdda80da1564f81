from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import os
import threading
import typing as t

import flask
import pytest
from conftest import PATIENCE
from flask import Flask

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import run
from flask_apitask import wait

if t.TYPE_CHECKING:
    from flask.testing import FlaskClient

pytest.importorskip("pytest_flask")


class Server(t.Protocol):
    """What the fixture live_server gives."""

    port: int


@pytest.fixture(autouse=True)
def nothing_outlives_its_test() -> None:
    """Leave that to the others: pytest-flask holds a context beyond a test's end."""


@pytest.fixture(scope="session")
def app() -> Flask:
    """What a project that uses pytest-flask has in its conftest.py."""
    flask_app = Flask(__name__)
    flask_app.config["SERVER_NAME"] = "localhost"
    ApiTask(flask_app)

    @flask_app.post("/signup/<name>")
    def signup(name: str) -> str:
        run(flask_app.extensions["done"].append, name)
        return "ok"

    @flask_app.get("/thread")
    def thread() -> str:
        return run(lambda: threading.current_thread().name).result(PATIENCE)

    return flask_app


@pytest.fixture
def done(app: Flask) -> list[str]:
    """Return the names that were signed up in a test."""
    names: list[str] = []
    app.extensions["done"] = names
    return names


def test_client(client: FlaskClient, done: list[str]) -> None:
    """What client.post() started is done when it returns, each time."""
    for name in ("first", "second"):
        assert client.post(f"/signup/{name}").status_code == 200

    assert done == ["first", "second"]


def test_context_around_the_test(app: Flask, done: list[str]) -> None:
    """The request that pytest-flask pushes has a scope of its own around it all."""
    assert flask.has_request_context()
    scope = current_scope()
    assert scope is not None
    ending = threading.Event()
    future = run(ending.wait, PATIENCE)

    # It would wait for ever, if it waited for the task of the test, too.
    app.test_client().post("/signup/first")
    assert done == ["first"]
    assert not future.done()
    assert current_scope() is scope
    ending.set()
    wait()
    assert future.result(0) is True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_live_server(request: pytest.FixtureRequest) -> None:
    """A server in a forked process answers, with tasks on threads of its own."""
    # What it starts can't be pickled, as Python 3.14 does by default.
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)

    try:
        server: Server = request.getfixturevalue("live_server")
    finally:
        multiprocessing.set_start_method(method, force=True)

    connection = http.client.HTTPConnection("localhost", server.port, timeout=PATIENCE)

    with contextlib.closing(connection):
        connection.request("GET", "/thread")
        response = connection.getresponse()
        assert response.status == 200
        assert response.read().startswith(b"apitask")
