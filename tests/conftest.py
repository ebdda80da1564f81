from __future__ import annotations

import gc
import os
import pathlib
import tempfile
import threading
import time
import typing as t

import brokers
import flask
import pytest
from flask import Flask
from postgres import Postgres

from flask_apitask import ApiTask
from flask_apitask import context

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import celery_app

# Seconds after which a test that waits for another thread has failed.
PATIENCE = 10.0
# Seconds by which a busy machine may exceed a promised time.
STALL = 3.0


def wait_until(condition: cabc.Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait for what another thread or process does, and can't tell us.

    :param patience: Seconds after which it has failed.
    """
    patient_until = time.monotonic() + patience

    while not condition():
        assert time.monotonic() < patient_until, "it has not come about"
        time.sleep(0.01)


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of the way of each ``gc.collect()``."""
    gc.collect()
    gc.freeze()


class AppFactory(t.Protocol):
    """Make an app with the extension; keywords are keys of its configuration."""

    def __call__(self, **config: t.Any) -> Flask: ...


@pytest.fixture
def make_app() -> AppFactory:
    """Return what makes an app."""

    def factory(**config: t.Any) -> Flask:
        flask_app = Flask(__name__)
        flask_app.config.update(config)
        ApiTask(flask_app)
        return flask_app

    return factory


@pytest.fixture(scope="session")
def redis() -> cabc.Iterator[brokers.Broker]:
    """Run Redis for the whole session, where it can be had."""
    yield from _run_broker("redis")


@pytest.fixture(scope="session")
def rabbitmq() -> cabc.Iterator[brokers.Broker]:
    """Run RabbitMQ for the whole session, where it can be had: it takes its time."""
    yield from _run_broker("rabbitmq")


@pytest.fixture(params=["redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> brokers.Broker:
    """Return one broker of each kind."""
    found: brokers.Broker = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def celeries() -> cabc.Iterator[celery_app.Celeries]:
    """Make apps with Celery, and leave nothing of them."""
    from celery_app import Celeries

    made = Celeries()
    yield made
    made.close()
    gc.collect()


def _run_broker(name: str) -> cabc.Iterator[brokers.Broker]:
    kind = brokers.BROKERS[name]

    if not kind.is_installed():
        missing = f"There is no {name} (Debian: {kind.package})"

        if os.environ.get("APITASK_REQUIRE_SERVICES") == "1":
            pytest.fail(missing)

        pytest.skip(missing)

    with brokers.running(name) as running:
        yield running


@pytest.fixture
def without_gc() -> cabc.Iterator[None]:
    """What is freed is freed by the count of its references."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def postgres() -> cabc.Iterator[Postgres]:
    """Run PostgreSQL for the whole session, where it can be had."""
    if not Postgres.is_installed():
        missing = "PostgreSQL is not installed (Debian: postgresql)"

        if os.environ.get("APITASK_REQUIRE_SERVICES") == "1":
            pytest.fail(missing)

        pytest.skip(missing)

    # Not in pytest's own folder, which nobody else may enter.
    with (
        tempfile.TemporaryDirectory(prefix="postgres-") as folder,
        Postgres(pathlib.Path(folder)) as running,
    ):
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """Return where the database is."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'site.db'}"

    server: Postgres = request.getfixturevalue("postgres")
    return server.url


@pytest.fixture(autouse=True)
def nothing_outlives_its_test(
    caplog: pytest.LogCaptureFixture,
) -> cabc.Iterator[None]:
    """No thread, no context and no socket is left behind by a test."""
    threads = set(threading.enumerate())
    sockets = _sockets()
    yield
    assert context.current_frame.get() is None, "a scope is left open"
    assert not flask.has_app_context(), "a context is left pushed"

    # An app takes its threads along as soon as nothing refers to it any more. The
    # traceback of a record does.
    for record in caplog.get_records("call"):
        record.exc_info = None

    for thread in set(threading.enumerate()) - threads:
        patient_until = time.monotonic() + PATIENCE

        # A thread on its way out of a task may refer to the app for a moment longer.
        while thread.is_alive() and time.monotonic() < patient_until:
            gc.collect()
            thread.join(0.1)

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
