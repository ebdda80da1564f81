from __future__ import annotations

import gc
import threading
import typing as t
import weakref

import pytest
from conftest import PATIENCE
from late_threads import in_time
from late_threads import make_late

from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import task
from flask_apitask import task_started

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory
    from flask import Flask

# Seconds; long enough for a thread to begin what the tests expect it to.
DEADLINE = 0.1


@pytest.fixture
def release() -> cabc.Iterator[threading.Event]:
    """Set at the end of the test, whatever its outcome."""
    release = threading.Event()
    yield release
    release.set()


@task("slow.one")
def slow(begun: threading.Event, release: threading.Event) -> str:
    begun.set()
    assert release.wait(PATIENCE)
    return "late"


def test_deadline(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, release: threading.Event
) -> None:
    """At the deadline the response goes out, and the rest is told (behaviour 18)."""
    app = make_app(APITASK_TIMEOUT=DEADLINE, APITASK_MAX_WORKERS=1)
    ran: list[str] = []
    futures: list[t.Any] = []

    @app.get("/")
    def index() -> str:
        begun = threading.Event()
        futures.append(run(slow, begun, release))
        futures.append(run(task("never.one")(lambda: ran.append("first"))))
        futures.append(run(task("never.two")(lambda: ran.append("second"))))
        assert begun.wait(PATIENCE)
        return "ok"

    @app.get("/next")
    def following() -> str:
        return run(str, "next").result(PATIENCE)

    response = in_time(app.test_client().get, "/")

    assert (response.status_code, response.text) == (200, "ok")
    assert [future.cancelled() for future in futures] == [False, True, True]
    assert app.test_client().get("/next").text == "next"

    records: list[t.Any] = caplog.records
    assert [record.levelname for record in records] == ["ERROR", "ERROR", "WARNING"]
    assert [record.task_name for record in records[:2]] == ["never.one", "never.two"]
    assert [record.getMessage() for record in records[:2]] == [
        f"Task {name!r} was cancelled: not begun within {DEADLINE} s."
        for name in ("never.one", "never.two")
    ]
    assert {record.action for record in records} == {"apitask"}
    assert {record.endpoint for record in records} == {"index"}
    assert records[2].task_names == ["slow.one"]
    text = records[2].getMessage()
    assert text.startswith(f"Went on without 1 task(s) not done after {DEADLINE} s.")
    assert "'slow.one'" in text
    assert "assert release.wait(PATIENCE)" in text

    release.set()
    assert futures[0].result(PATIENCE) == "late"
    assert ran == []
    assert len(caplog.records) == 3


def test_late_failure_is_logged(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, release: threading.Event
) -> None:
    """A task that fails after the deadline is logged when it does (behaviour 18)."""
    app = make_app(APITASK_TIMEOUT=DEADLINE)
    futures: list[t.Any] = []

    def fail(begun: threading.Event) -> None:
        begun.set()
        assert release.wait(PATIENCE)
        raise LookupError("late")

    @app.get("/")
    def index() -> str:
        begun = threading.Event()
        futures.append(run(fail, begun))
        assert begun.wait(PATIENCE)
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    release.set()
    assert isinstance(futures[0].exception(PATIENCE), LookupError)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "ERROR"]


def test_tasks_that_are_in_time(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """With a timeout the request waits for what is done by then (behaviour 18)."""
    app = make_app(APITASK_TIMEOUT=PATIENCE)
    ending = threading.Event()
    done: list[str] = []

    def work() -> None:
        assert ending.wait(PATIENCE)
        done.append("task")

    @app.get("/")
    def index() -> str:
        run(work)
        return "ok"

    app.teardown_request(lambda exc: ending.set())

    assert in_time(app.test_client().get, "/").status_code == 200
    assert done == ["task"]
    assert caplog.records == []


def test_request_does_not_help_with_a_timeout(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """With a timeout the request thread runs no task itself (behaviour 18).

    It could not leave in time. Without threads then, nothing is run.
    """
    app = make_late(make_app(APITASK_TIMEOUT=DEADLINE))
    done: list[str] = []

    @app.get("/")
    def index() -> str:
        run(done.append, "task")
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert done == []
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_deadline_of_a_block(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, release: threading.Event
) -> None:
    """A block has a deadline of its own, and its tasks are told the same way."""
    app = make_app()

    with app.app_context():
        with open_scope(timeout=DEADLINE):
            begun = threading.Event()
            future = run(slow, begun, release)
            assert begun.wait(PATIENCE)

        assert not future.done()

    records: list[t.Any] = caplog.records
    assert [record.levelname for record in records] == ["WARNING"]
    assert records[0].task_names == ["slow.one"]
    assert records[0].endpoint is None
    release.set()
    assert future.result(PATIENCE) == "late"


class Argument:
    """An object that can be referred to weakly."""


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_a_thousand_tasks(make_app: AppFactory, timeout: float | None) -> None:
    """1,000 tasks stay under the caps, and nothing of them is kept (behaviour 17)."""
    app = make_app(APITASK_POOL_SIZE=3, APITASK_MAX_WORKERS=2, APITASK_TIMEOUT=timeout)
    counting = threading.Lock()
    running = 0
    most = 0
    threads: set[int] = set()
    references: list[weakref.ref[Argument]] = []

    def work(argument: Argument) -> Argument:
        nonlocal running, most

        with counting:
            running += 1
            most = max(most, running)
            threads.add(threading.get_ident())

        with counting:
            running -= 1

        return argument

    @app.get("/")
    def index() -> str:
        for _ in range(1000):
            argument = Argument()
            references.append(weakref.ref(argument))
            run(work, argument)

        return "ok"

    before = threading.active_count()
    gc.disable()

    try:
        assert app.test_client().get("/").status_code == 200
        alive = sum(reference() is not None for reference in references)
    finally:
        gc.enable()

    assert len(references) == 1000
    assert alive == 0
    assert 1 <= most <= 2
    assert threading.active_count() - before <= 3
    # Those of the pool, and the one that helps.
    assert len(threads) <= 4


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_how_tasks_run(make_app: AppFactory, timeout: float | None) -> None:
    """The pool's only thread is busy: the request helps, unless it has a deadline."""
    app = make_app(APITASK_POOL_SIZE=1, APITASK_TIMEOUT=timeout)
    begun = threading.Event()
    ending = threading.Event()
    how: dict[str, str] = {}

    def started(sender: Flask, **fields: t.Any) -> None:
        how[fields["name"]] = fields["how"]

        # The second task is on its way, wherever it runs: the first may end.
        if fields["name"] == "second" and timeout is None:
            ending.set()

    def first() -> None:
        begun.set()
        assert ending.wait(PATIENCE)

    @app.get("/")
    def index() -> str:
        run(task("first")(first))
        assert begun.wait(PATIENCE)
        run(task("second")(lambda: None))
        return "ok"

    if timeout is not None:
        app.teardown_request(lambda exc: ending.set())

    with task_started.connected_to(started):
        assert in_time(app.test_client().get, "/").status_code == 200

    assert how == {"first": "thread", "second": "thread" if timeout else "helped"}
