"""Handing over to real brokers, which die, hang, refuse and come back."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import typing as t
from unittest import mock

import pytest
from conftest import STALL
from conftest import wait_until

from flask_apitask import run
from flask_apitask import task_finished

pytest.importorskip("celery")
pytest.importorskip("redis")

from brokers import Road
from celery.result import AsyncResult
from celery.result import EagerResult
from celery_app import double
from celery_app import fail
from kombu.transport.memory import Transport
from redis import Redis

import flask_apitask.celery.broker as broker_module
from flask_apitask.executor.scope import TaskScope

if t.TYPE_CHECKING:
    from brokers import Broker
    from celery_app import Celeries
    from flask import Flask

    from flask_apitask.executor.pool import ThreadPool

# Seconds after which a broker that is silent counts as down, in these tests.
TIMEOUT = 1.0
PATIENCE = 10.0


def hand_over(app: Flask, number: int = 4) -> tuple[t.Any, float]:
    """Hand one task over; return its result, and how long it took."""
    began = time.monotonic()

    with app.test_request_context():
        result: t.Any = run(double, number).result(PATIENCE)

    return result, time.monotonic() - began


def wait_for_confirmation(app: Flask) -> None:
    """Hand over until the broker is quick enough to say that it has a task."""
    wait_until(lambda: not isinstance(hand_over(app)[0], EagerResult))


def find_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was said of the broker."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.INFO and "Celery's broker" in record.getMessage()
    ]


def find_task(app: Flask, number: str) -> dict[str, t.Any]:
    """Take messages from the queue up to the one with an id, and return its headers."""
    with app.extensions["celery"].connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")

        while True:
            message = queue.get(timeout=PATIENCE)
            message.ack()

            if message.headers["id"] == number:
                assert message.content_type == "application/json"
                queue.close()
                return {**message.headers, "payload": message.payload}


def find_threads(app: Flask) -> ThreadPool:
    """Return the threads that use new connections."""
    (broker,) = app.extensions["apitask_celery"]._brokers.values()
    threads: ThreadPool = broker._threads
    return threads


def purge(app: Flask) -> int:
    """Take all messages from the queue, and return how many there were."""
    with app.extensions["celery"].connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")
        count: int = queue.consumer.purge()
        queue.close()
        return count


def test_published_task(celeries: Celeries, broker: Broker) -> None:
    """What is in the queue when a request ends is the task, by its name, in JSON."""
    app = celeries.make(broker.url)
    result, _ = hand_over(app)
    assert type(result).__mro__[1] is AsyncResult
    headers = find_task(app, result.id)
    assert (headers["task"], headers["id"]) == ("report.double", result.id)
    assert headers["payload"][:2] == [[4], {}]
    assert headers["ignore_result"] is False


def test_connections_are_kept_and_bounded(celeries: Celeries, redis: Broker) -> None:
    """Ten tasks at once use the connections that Celery's key allows, again."""
    app = celeries.make(redis.url, CELERY={"broker_pool_limit": 2})

    with Redis(port=redis.port) as client:
        before = client.info("stats")["total_connections_received"]

        for _ in range(2):
            with app.test_request_context():
                futures: list[t.Any] = [run(double, number) for number in range(10)]
                results = [future.result(PATIENCE) for future in futures]

            assert not any(isinstance(result, EagerResult) for result in results)

        connections = client.info("stats")["total_connections_received"] - before

    # Kombu opens one more for each of the two.
    assert 0 < connections <= 2 * 2


def test_broker_that_is_killed(
    celeries: Celeries,
    broker: Broker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an outage tasks run here, with one WARNING; no restart is needed after it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(broker_module, "_LOOK_EVERY", 0.5)
    keys = [{"task_ignore_result": ignored} for ignored in (False, True)]
    apps = [
        celeries.make(broker.url, CELERY=celery, APITASK_CELERY_TIMEOUT=TIMEOUT)
        for celery in keys
    ]
    idle = celeries.make(broker.url)

    for app in (*apps, idle):
        wait_for_confirmation(app)

    caplog.clear()
    broker.kill()

    try:
        for app in apps * 5:
            result, seconds = hand_over(app)
            assert isinstance(result, EagerResult)
            assert result.get() == 8
            assert seconds < TIMEOUT + STALL
    finally:
        broker.start()

    # Its kept connections are dead, which is no outage.
    result, _ = hand_over(idle)
    assert not isinstance(result, EagerResult)
    assert find_task(idle, result.id)["task"] == "report.double"

    for app in apps:
        # The broker says nothing when it is ready.
        wait_for_confirmation(app)

    # Of two apps; the third one had no outage.
    cause = f"Celery's broker did not confirm a task within {TIMEOUT} s"
    down, back = find_warnings(caplog)[:2], find_warnings(caplog)[2:]
    assert [text.startswith(cause) for text in down] == [True, True]
    assert back == ["Celery's broker is back."] * 2


@pytest.mark.parametrize("connection", ["kept", "new"])
def test_broker_that_hangs(
    celeries: Celeries,
    broker: Broker,
    connection: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A silent broker holds one task for the timeout, and the next ones not at all."""
    monkeypatch.setattr(broker_module, "_LOOK_EVERY", 60.0)
    app = celeries.make(broker.url, APITASK_CELERY_TIMEOUT=TIMEOUT)

    if connection == "kept":
        wait_for_confirmation(app)
        caplog.clear()

    publish = broker_module.Broker._publish
    watched = mock.patch.object(
        broker_module.Broker, "_publish", autospec=True, side_effect=publish
    )
    broker.signal(signal.SIGSTOP)

    try:
        with watched as tries:
            first, seconds = hand_over(app)
            second, _ = hand_over(app)
    finally:
        broker.signal(signal.SIGCONT)

    assert [first.get(), second.get()] == [8, 8]
    assert TIMEOUT / 4 < seconds < TIMEOUT + STALL
    assert tries.call_count == 1
    assert len(find_warnings(caplog)) == 1


def test_broker_that_trickles(
    celeries: Celeries,
    broker: Broker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new connection on which replies trickle holds a task up for the timeout only.

    There are as many threads left behind as connections are allowed, and they are used
    again afterwards. They publish nothing that has run here.
    """
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(broker_module, "_LOOK_EVERY", 0.0)

    timeout = TIMEOUT / 2

    # A socket's timeout is half of the broker's.
    with Road(broker, trickle=0.4 * timeout) as road:
        app = celeries.make(
            road.url, CELERY={"broker_pool_limit": 1}, APITASK_CELERY_TIMEOUT=timeout
        )
        purge(app)
        road.trickles.set()

        for _ in range(3):
            result, seconds = hand_over(app)
            assert isinstance(result, EagerResult)
            assert result.get() == 8
            assert seconds < timeout + STALL
            assert len(find_threads(app)._abandoned) <= 1

        road.trickles.clear()
        wait_until(lambda: not find_threads(app)._abandoned)
        wait_for_confirmation(app)
        assert purge(app) == 1

    # Nothing is said of what was left behind.
    loggers = {app.name, "flask_apitask"}
    _, back = [r.getMessage() for r in caplog.records if r.name in loggers]
    assert back == "Celery's broker is back."


@pytest.mark.parametrize("declared", [False, True])
def test_connection_that_takes_too_long(
    celeries: Celeries, declared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread left behind does not publish what its request has done."""
    monkeypatch.setattr(broker_module, "_LOOK_EVERY", 0.0)
    existing = {"exchange": "celery", "routing_key": "celery"}
    routes = {"task_routes": {} if declared else {"report.*": existing}}
    app = celeries.make(CELERY=routes, APITASK_CELERY_TIMEOUT=0.2)
    purge(app)
    answered, connect = threading.Event(), Transport.establish_connection

    def connect_late(self: Transport) -> t.Any:
        assert answered.wait(PATIENCE)
        return connect(self)  # type: ignore[no-untyped-call]

    with monkeypatch.context() as patch:
        patch.setattr(Transport, "establish_connection", connect_late)
        result, _ = hand_over(app)
        assert isinstance(result, EagerResult)

        answered.set()
        wait_until(lambda: not find_threads(app)._abandoned)

    assert purge(app) == 0
    wait_for_confirmation(app)
    assert purge(app) == 1


@pytest.mark.parametrize("limit", [0, 2])
def test_connections_that_never_open(
    celeries: Celeries, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads left behind have a limit, and leave those of the app alone."""
    monkeypatch.setattr(broker_module, "_LOOK_EVERY", 0.0)
    app = celeries.make(
        CELERY={"broker_pool_limit": limit},
        APITASK_CELERY_TIMEOUT=0.05,
        APITASK_POOL_SIZE=1,
    )
    ended, began = threading.Event(), threading.Event()
    monkeypatch.setattr(Transport, "establish_connection", lambda self: ended.wait())

    for _ in range(12):
        with app.app_context():
            here: t.Any = run(double, 4).result()
            assert isinstance(here, EagerResult)

    assert len(find_threads(app)._abandoned) == (limit or 10)

    with app.test_request_context():
        run(began.set)
        # The view does not wait for the scope.
        assert began.wait(PATIENCE)

    ended.set()
    wait_until(lambda: not find_threads(app)._abandoned)


def test_exit_while_a_connection_opens() -> None:
    """The process exits at once, and reports no task, as none is left behind."""
    code = (
        "import threading; from celery_app import create_app, double, run\n"
        "from kombu.transport.memory import Transport\n"
        "ended = threading.Event()\n"
        "Transport.establish_connection = lambda self: ended.wait()\n"
        "celery = {'broker_url': 'memory://'}\n"
        "app = create_app(CELERY=celery, APITASK_CELERY_TIMEOUT=0.2)\n"
        "with app.test_request_context():\n"
        "    print(run(double, 4).result().get())"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
    )
    assert finished.stdout == "8\n"
    assert "did not confirm a task" in finished.stderr
    assert "process exits" not in finished.stderr


@pytest.mark.parametrize("step", ["__init__", "submit", "end"])
def test_interrupted_connection(
    celeries: Celeries, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C while another thread connects takes no connection out of use."""
    app = celeries.make(CELERY={"broker_pool_limit": 1})
    real = getattr(TaskScope, step)

    def interrupt(*args: t.Any) -> t.NoReturn:
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, app.app_context():
        patch.setattr(TaskScope, step, interrupt)

        with pytest.raises(KeyboardInterrupt):
            run(double, 4)

    result, _ = hand_over(app)
    assert not isinstance(result, EagerResult)


def test_connection_that_gets_no_thread(
    celeries: Celeries, redis: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that no thread has begun to use in time is given back."""
    monkeypatch.setattr(broker_module, "_LOOK_EVERY", 0.0)
    app = celeries.make(
        redis.url, CELERY={"broker_pool_limit": 1}, APITASK_CELERY_TIMEOUT=0.2
    )

    with app.app_context(), monkeypatch.context() as patch:
        threads = broker_module._Threads
        patch.setattr(threads, "request", lambda pool, scope: True)
        here: t.Any = run(double, 4).result()
        assert isinstance(here, EagerResult)

    wait_for_confirmation(app)


def test_confirmation_that_is_lost(celeries: Celeries, redis: Broker) -> None:
    """A task that came through without a confirmation is done here as well."""
    app = celeries.make(redis.url, APITASK_CELERY_TIMEOUT=TIMEOUT)

    with Redis(port=redis.port) as client:
        wait_for_confirmation(app)
        client.delete("celery")
        redis.signal(signal.SIGSTOP)

        try:
            result, _ = hand_over(app)
        finally:
            redis.signal(signal.SIGCONT)

        assert result.get() == 8
        # It was in the socket, and Redis reads on where it was stopped.
        wait_until(lambda: client.llen("celery") == 1)


def test_broker_that_is_full(
    celeries: Celeries, redis: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """A broker that refuses a task counts as down for now."""
    app = celeries.make(redis.url)

    with Redis(port=redis.port) as client:
        client.config_set("maxmemory", 1)

        try:
            result, _ = hand_over(app)
        finally:
            client.config_set("maxmemory", 0)

    assert result.get() == 8
    assert len(find_warnings(caplog)) == 1


def test_queue_that_is_full(
    celeries: Celeries, rabbitmq: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """A negative confirmation from RabbitMQ is noticed."""
    arguments = {"x-max-length": 0, "x-overflow": "reject-publish"}
    queues = {"full": {"queue_arguments": arguments}}
    routing = {"task_queues": queues, "task_default_queue": "full"}
    app = celeries.make(rabbitmq.url, CELERY=routing)
    result, _ = hand_over(app)
    assert result.get() == 8
    assert len(find_warnings(caplog)) == 1


def test_many_threads_of_an_outage(
    celeries: Celeries, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that meet an outage together write one WARNING."""
    app = celeries.make(broker.url, APITASK_CELERY_TIMEOUT=TIMEOUT)
    broker.signal(signal.SIGSTOP)

    try:
        began = time.monotonic()

        with app.test_request_context():
            futures = [run(double, number) for number in range(8)]
            values: list[t.Any] = [future.result(PATIENCE) for future in futures]

        # One after the other it would be eight times as long.
        assert time.monotonic() - began < TIMEOUT + STALL
    finally:
        broker.signal(signal.SIGCONT)

    assert [value.get() for value in values] == [2 * number for number in range(8)]
    assert len(find_warnings(caplog)) == 1


def test_one_looks_for_the_others(
    celeries: Celeries,
    redis: Broker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While one task tries a broker that is down, the others do without it."""
    monkeypatch.setattr(broker_module, "_LOOK_EVERY", 0.0)
    app = celeries.make(redis.url, APITASK_CELERY_TIMEOUT=TIMEOUT)
    looking, released = threading.Event(), threading.Event()

    def look(*args: object) -> None:
        looking.set()
        assert released.wait(2 * PATIENCE)
        raise OSError

    redis.signal(signal.SIGSTOP)

    try:
        hand_over(app)
    finally:
        redis.signal(signal.SIGCONT)

    [broker] = app.extensions["apitask_celery"]._brokers.values()
    monkeypatch.setattr(broker_module.Broker, "_publish", look)
    broker._timeout = 2 * PATIENCE
    looks = threading.Thread(target=hand_over, args=[app])
    looks.start()
    assert looking.wait(PATIENCE)
    result, _ = hand_over(app)
    released.set()
    looks.join(PATIENCE)
    assert result.get() == 8
    assert len(find_warnings(caplog)) == 1


def test_task_that_fails_here(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """A task of an outage that fails is one ERROR, and its future raises it."""
    app = celeries.make("redis://127.0.0.1:1/0")
    hows: list[str] = []

    def receive(app: Flask, how: str, **extra: object) -> None:
        hows.append(how)

    with app.test_request_context(), task_finished.connected_to(receive):
        future = run(fail, "no")

        with pytest.raises(LookupError, match="no"):
            future.result(PATIENCE)

    assert hows == ["thread"]
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.getMessage().startswith("Task 'report.fail' of GET ")
    assert record.funcName == "fail"


def test_broker_url_is_not_logged(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """What may hold a password is not in the WARNING."""
    app = celeries.make("redis://:hunter2@127.0.0.1:1/0")
    hand_over(app)
    assert len(find_warnings(caplog)) == 1
    assert "hunter2" not in caplog.text


def test_pickle_is_warned_of(
    celeries: Celeries, redis: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """A Celery app that accepts pickle lets its broker run code: one WARNING."""
    app = celeries.make(redis.url, CELERY={"accept_content": ["json", "pickle"]})

    for _ in range(2):
        hand_over(app)

    warned = [r.getMessage() for r in caplog.records if "accepts pickle" in r.message]
    assert len(warned) == 1


@pytest.mark.parametrize("ignored", [False, True])
def test_results_by_rpc_are_warned_of(
    celeries: Celeries,
    rabbitmq: Broker,
    caplog: pytest.LogCaptureFixture,
    ignored: bool,
) -> None:
    """One WARNING says that no view can get the results, unless they are ignored."""
    backend = {"result_backend": "rpc://", "task_ignore_result": ignored}
    app = celeries.make(rabbitmq.url, CELERY=backend)

    for _ in range(2):
        hand_over(app)

    warned = [r.getMessage() for r in caplog.records if "rpc://" in r.message]
    assert len(warned) == (0 if ignored else 1)


def test_fork_after_use(celeries: Celeries, broker: Broker) -> None:
    """A child has connections of its own, and those of its parent still work."""
    app = celeries.make(broker.url)
    first, _ = hand_over(app)
    pid = os.fork()

    if pid == 0:
        # Whatever happens, the child is not to go on with the tests.
        try:
            result, _ = hand_over(app)
            app.extensions["apitask_celery"].close()
            os._exit(int(isinstance(result, EagerResult)))
        finally:
            os._exit(2)

    assert os.waitpid(pid, 0)[1] == 0
    second, _ = hand_over(app)
    assert find_task(app, first.id)["id"] != find_task(app, second.id)["id"]
