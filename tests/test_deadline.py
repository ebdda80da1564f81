from __future__ import annotations

import functools
import gc
import threading
import traceback
import typing as t
import weakref

import pytest
from conftest import PATIENCE
from conftest import wait_until
from interleaving import GapLock
from late_threads import in_time
from late_threads import make_late
from reporting import Reporting
from scopes import Gate
from scopes import join
from scopes import make_scope
from scopes import no_collector
from scopes import nothing
from scopes import Payload
from scopes import start

from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import task
from flask_apitask import task_started
from flask_apitask.executor.future import TaskFuture
from flask_apitask.executor.overdue import _NO_STACK as NO_STACK
from flask_apitask.executor.overdue import find_overdue
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.runner import Runner

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory
    from flask import Flask

# Seconds. It is short, as tests are stuck for as long.
DEADLINE = 0.1


@pytest.fixture
def trap() -> cabc.Iterator[Gate]:
    """Where tasks are stuck until the end of the test, or until it lets them out."""
    trap = Gate()
    yield trap
    trap.opened.set()


def get_stuck(trap: Gate, count: int = 1) -> None:
    """Run tasks of the current scope, and return as soon as they are stuck."""
    present = len(trap.threads)

    for _ in range(count):
        run(task("trapped")(functools.partial(trap)))

    wait_until(lambda: len(trap.threads) == present + count)


def make_stuck_app(make_app: AppFactory, trap: Gate, size: int) -> Flask:
    """Make an app with a view that leaves as many stuck tasks as it is told."""
    app = make_app(APITASK_POOL_SIZE=size, APITASK_TIMEOUT=DEADLINE)

    @app.get("/stuck/<int:count>")
    def stuck(count: int) -> str:
        get_stuck(trap, count)
        return "ok"

    @app.get("/threads/<int:count>")
    def use_threads(count: int) -> list[int]:
        """Return the identifiers of as many threads, all used at the same time."""
        meeting = threading.Barrier(count)

        def meet() -> int:
            meeting.wait(PATIENCE)
            return threading.get_ident()

        return [future.result(PATIENCE) for future in [run(meet) for _ in range(count)]]

    return app


def test_tasks_left_behind_are_reported(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, trap: Gate
) -> None:
    """At the deadline the response is sent, and the rest is logged (behaviour 18)."""
    app = make_app(APITASK_TIMEOUT=DEADLINE, APITASK_MAX_WORKERS=1)
    ran: list[str] = []
    futures: list[t.Any] = []

    @app.get("/")
    def index() -> str:
        futures.append(run(task("slow.one")(functools.partial(trap))))
        futures.append(run(task("never.one")(lambda: ran.append("first"))))
        futures.append(run(task("never.two")(lambda: ran.append("second"))))
        assert trap.begun.wait(PATIENCE)
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
    assert [record.apitask_task for record in records[:2]] == ["never.one", "never.two"]
    assert [record.getMessage() for record in records[:2]] == [
        f"Task {name!r} of GET / was cancelled: not started within {DEADLINE} s"
        " (APITASK_TIMEOUT)."
        for name in ("never.one", "never.two")
    ]
    assert {record.apitask_endpoint for record in records} == {"index"}
    assert records[2].apitask_tasks == ["slow.one"]
    text = records[2].getMessage()
    assert "'slow.one'" in text
    assert "assert self.opened.wait(PATIENCE)" in text

    trap.opened.set()
    assert futures[0].result(PATIENCE) == "through"
    assert ran == []
    assert len(caplog.records) == 3


def test_task_fails_after_the_deadline(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged when it does (behaviour 18)."""
    app = make_app(APITASK_TIMEOUT=DEADLINE)
    futures: list[t.Any] = []
    gate = Gate()

    def fail_late() -> None:
        gate()
        raise LookupError("late")

    @app.get("/")
    def index() -> str:
        futures.append(run(fail_late))
        assert gate.begun.wait(PATIENCE)
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    gate.opened.set()
    assert isinstance(futures[0].exception(PATIENCE), LookupError)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "ERROR"]


@pytest.mark.parametrize("late", [False, True])
def test_tasks_in_time(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    """A request with a deadline waits for what is done by then, on another thread."""
    app = make_app(APITASK_TIMEOUT=PATIENCE)
    ending = threading.Event()
    idents: list[int] = []

    def work() -> None:
        assert ending.wait(PATIENCE)
        idents.append(threading.get_ident())

    @app.get("/")
    def index() -> list[int]:
        run(work)
        return [threading.get_ident()]

    app.teardown_request(lambda exc: ending.set())
    response = in_time((make_late(app) if late else app).test_client().get, "/")
    assert len(idents) == 1
    assert response.json != idents
    assert caplog.records == []


def test_deadline_of_a_block(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, trap: Gate
) -> None:
    """A block has a deadline of its own, and its tasks are told the same way."""
    app = make_app()

    with app.app_context(), open_scope(timeout=DEADLINE):
        get_stuck(trap)

    (record,) = t.cast("list[t.Any]", caplog.records)
    assert record.levelname == "WARNING"
    assert record.apitask_tasks == ["trapped"]
    assert record.apitask_endpoint is None
    assert f"after {DEADLINE} s (timeout of the scope): 1" in record.getMessage()


def test_stuck_threads_are_named_and_replaced(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, trap: Gate
) -> None:
    """The response goes out, and other threads serve the next request.

    It overlaps its tasks with the view, as ever.
    """
    app = make_stuck_app(make_app, trap, 2)
    how: list[str] = []

    def started(sender: Flask, **fields: t.Any) -> None:
        how.append(fields["how"])

    response = in_time(app.test_client().get, "/stuck/2")
    assert (response.status_code, response.text) == (200, "ok")
    (record,) = t.cast("list[t.Any]", caplog.records)
    assert record.levelname == "WARNING"
    assert record.apitask_tasks == ["trapped", "trapped"]
    assert record.getMessage().count("self.opened.wait(PATIENCE)") == 2
    pool = app.extensions["apitask"].pool
    assert repr(pool) == "<ThreadPool size=2 busy=2 idle=0 abandoned=2 waiting=0>"

    with task_started.connected_to(started):
        used = in_time(app.test_client().get, "/threads/2").json

    assert how == ["thread", "thread"]
    ours = {threading.get_ident(), *(thread.ident for thread in trap.threads)}
    assert used is not None
    assert not ours.intersection(used)
    trap.opened.set()
    resting = "<ThreadPool size=2 busy=0 idle=2 abandoned=0 waiting=0>"
    wait_until(lambda: repr(pool) == resting)
    assert len(caplog.records) == 1


def test_more_stuck_tasks_than_threads(make_app: AppFactory, trap: Gate) -> None:
    """Even with more stuck tasks than threads, requests end and their tasks run."""
    app = make_stuck_app(make_app, trap, 1)

    @app.get("/more")
    def more() -> str:
        run(trap)
        return "ok"

    for count in range(1, 5):
        assert in_time(app.test_client().get, "/more").text == "ok"
        wait_until(lambda count=count: len(trap.threads) == count)  # type: ignore[misc]

    assert in_time(app.test_client().get, "/threads/1").json
    trap.opened.set()
    pool = app.extensions["apitask"].pool
    wait_until(lambda: pool._count() <= 1 and not pool._abandoned)


def test_scopes_that_queue_are_served(make_app: AppFactory, trap: Gate) -> None:
    """What queues while all threads are stuck begins at the deadline of those."""
    app = make_stuck_app(make_app, trap, 1)
    queued = threading.Event()
    begun = threading.Event()

    @app.get("/late")
    def late() -> str:
        get_stuck(trap)
        assert queued.wait(PATIENCE)
        return "late"

    @app.get("/queues")
    def queues() -> str:
        run(begun.set)
        queued.set()
        # Not a wait that would get it a thread of its own.
        assert begun.wait(PATIENCE)
        return "ok"

    other = start(app.test_client().get, "/late")
    wait_until(lambda: bool(trap.threads))
    assert in_time(app.test_client().get, "/queues").text == "ok"
    join(other)


def test_report_of_a_scope() -> None:
    """It has what was cancelled, but not by the user, and what runs, with its stack."""
    gate = Gate()
    runner = Reporting()
    scope = make_scope(1, timeout=0.001, runner=runner)
    running = scope.submit(gate)
    assert gate.begun.wait(PATIENCE)
    queued: list[t.Any] = [scope.submit(fn) for fn in (nothing, list, nothing)]
    queued[2].cancel()
    scope.end()
    (report,) = runner.reports
    assert report.timeout == 0.001
    assert report.abandoned == 1
    assert report.cancelled == ["scopes.nothing", "builtins.list"]
    ((name, stack),) = report.running
    assert name == "scopes.Gate"
    # Its own lines only.
    assert stack.startswith(f'  File "{Gate.__call__.__code__.co_filename}"')
    assert "self.opened.wait(PATIENCE)" in stack
    assert [future.cancelled() for future in queued] == [True] * 3
    assert scope.closed
    gate.opened.set()
    assert running.result(PATIENCE) == "through"


@pytest.mark.parametrize("gap", [3, 4])
def test_task_is_done_while_it_is_reported(gap: int) -> None:
    """A task that finishes before its stack is read at the deadline is not reported."""
    gate = Gate()
    runner = Reporting()
    scope = make_scope(timeout=0.0, runner=runner)
    future = scope.submit(gate)
    assert gate.begun.wait(PATIENCE)

    def finish() -> None:
        gate.opened.set()
        future.result(PATIENCE)
        wait_until(lambda: not scope._unfinished)

    # The lock is given back to wait, to end the wait, to cancel what is queued, and to
    # look at what runs.
    lock: t.Any = GapLock(gap, finish, "MainThread")
    scope._lock = lock
    scope.end()
    assert lock._released >= gap
    assert runner.reports == []


def test_task_that_is_about_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that a thread has taken but not begun is reported, without a stack.

    The thread that holds it is replaced as well.
    """
    taken, go_on = threading.Event(), threading.Event()
    future_run = TaskFuture.run

    def run_late(future: TaskFuture[t.Any], *args: t.Any) -> None:
        taken.set()
        assert go_on.wait(PATIENCE)
        future_run(future, *args)

    monkeypatch.setattr(TaskFuture, "run", run_late)
    runner = Reporting()
    scope = make_scope(1, timeout=0.01, runner=runner)
    scope.submit(nothing)
    assert taken.wait(PATIENCE)
    scope.end()
    (report,) = runner.reports
    assert report.abandoned == 1
    assert [name for name, _ in report.running] == ["scopes.nothing"]
    go_on.set()


def test_stack_of_a_task_on_no_thread_of_the_system() -> None:
    """A task that a greenlet runs is reported without a stack."""
    future: TaskFuture[None] = TaskFuture(Runner(), None, (nothing, (), {}, 0.0))
    expected = [("scopes.nothing", NO_STACK)]
    assert [task[:2] for task in find_overdue([future], 0.0)] == expected
    # Nor of a thread that is not in the task any more.
    pool = ThreadPool(1)

    with make_scope(pool=pool) as scope:
        future.thread = scope.submit(threading.get_ident).result(PATIENCE)

    wait_until(lambda: bool(pool._idle))
    assert [task[:2] for task in find_overdue([future], 0.0)] == expected


def test_thread_that_has_left_is_not_abandoned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that finishes its task during the report serves another scope."""
    pool = ThreadPool(1)
    stuck, gate = Gate(), Gate()
    extract = traceback.StackSummary.extract
    runner = Reporting()

    def extract_late(*args: t.Any) -> t.Any:
        stuck.opened.set()
        assert gate.begun.wait(PATIENCE)
        return extract(*args)

    late = make_scope(1, pool, timeout=DEADLINE, runner=runner)
    late.submit(stuck)
    assert stuck.begun.wait(PATIENCE)

    with make_scope(1, pool) as scope:
        scope.submit(gate)
        monkeypatch.setattr(traceback.StackSummary, "extract", extract_late)
        late.end()
        gate.opened.set()

    assert [report.abandoned for report in runner.reports] == [0]


def test_plain_report_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A scope that belongs to no app says what it left behind, too.

    And keeps no frame alive that was on a stack at that time.
    """
    gate = Gate()
    references: list[weakref.ref[Payload]] = []

    def stuck(payload: Payload) -> None:
        gate()

    def end() -> None:
        local = Payload()
        references.append(weakref.ref(local))
        scope.end()

    with no_collector():
        scope = make_scope(timeout=0.0)
        payload = Payload()
        references.append(weakref.ref(payload))
        scope.submit(stuck, payload)
        del payload
        assert gate.begun.wait(PATIENCE)
        end()
        assert references[1]() is None, "a local variable of the caller is kept alive"
        gate.opened.set()
        scope.wait(PATIENCE)
        assert references[0]() is None, "an argument of the stuck task is kept alive"

    (record,) = caplog.records
    assert record.getMessage().startswith("A scope left tasks behind: TimeoutReport(")


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_thousand_tasks_of_a_request(
    make_app: AppFactory, timeout: float | None
) -> None:
    """They respect the caps, and nothing of them is kept (behaviour 17)."""
    app = make_app(APITASK_POOL_SIZE=3, APITASK_MAX_WORKERS=2, APITASK_TIMEOUT=timeout)
    threads: set[int] = set()
    references: list[weakref.ref[Payload]] = []

    def work(argument: Payload) -> None:
        threads.add(threading.get_ident())

    @app.get("/")
    def index() -> str:
        for _ in range(1000):
            argument = Payload()
            references.append(weakref.ref(argument))
            run(work, argument)

        return "ok"

    gc.disable()

    try:
        assert app.test_client().get("/").status_code == 200
        alive = sum(reference() is not None for reference in references)
    finally:
        gc.enable()

    assert (len(references), alive) == (1000, 0)
    # Those of the pool, and one more for the request that waits.
    assert len(threads) <= 4


def test_interrupt_does_not_lose_the_report() -> None:
    """A Ctrl-C while other threads are started does not lose the report."""

    class Interrupted(ThreadPool):
        def replace_abandoned(self) -> None:
            raise KeyboardInterrupt

    reporting, gate = Reporting(), Gate()
    scope = make_scope(1, Interrupted(1), timeout=0.01, runner=reporting)
    scope.submit(gate)
    scope.submit(str)
    assert gate.begun.wait(PATIENCE)

    with pytest.raises(KeyboardInterrupt):
        scope.end()

    (report,) = reporting.reports
    assert report.cancelled == ["builtins.str"]
    assert [name for name, _ in report.running] == ["scopes.Gate"]
    gate.opened.set()
    wait_until(lambda: not scope._running)
