"""A done callback that is added late, or whose task is cancelled."""

from __future__ import annotations

import asyncio
import threading
import typing as t

import pytest
from conftest import PATIENCE
from conftest import wait_until
from late_threads import in_time
from late_threads import make_late
from scopes import Gate

from flask_apitask import open_scope
from flask_apitask import run

if t.TYPE_CHECKING:
    from conftest import AppFactory

    from flask_apitask.executor.future import TaskFuture


@pytest.mark.parametrize("late", [False, True], ids=["free", "full"])
def test_late_callback_may_need_a_lock_of_whoever_adds_it(
    make_app: AppFactory, late: bool
) -> None:
    """It is not waited for where it is added, but at the end of the request."""
    app = make_late(make_app()) if late else make_app()
    lock = threading.RLock()
    called: list[object] = []

    def call_back(future: TaskFuture[t.Any]) -> None:
        with lock:
            called.append(future.result())

    @app.get("/")
    def index() -> str:
        future = run(str)
        future.result(PATIENCE)

        with lock:
            future.add_done_callback(call_back)  # type: ignore[arg-type]
            assert called == []

        return "ok"

    assert in_time(app.test_client().get, "/").text == "ok"
    assert called == [""]


def test_callback_that_is_added_by_the_thread_that_skipped_the_task(
    make_app: AppFactory,
) -> None:
    """It is not called there either: another task may hold a lock by then."""
    app, first = make_app(), Gate()
    cancelled: list[TaskFuture[t.Any]] = []
    called: list[object] = []

    def add() -> list[object]:
        cancelled[0].add_done_callback(called.append)
        return called.copy()

    with app.app_context(), open_scope(max_workers=1):
        # One thread works through the queue.
        run(first)
        assert first.begun.wait(PATIENCE)
        cancelled.append(run(str))
        cancelled[0].cancel()
        added = run(add)
        first.opened.set()
        assert added.result(PATIENCE) == []

    assert called == cancelled


def test_callback_of_a_task_that_is_cancelled_at_the_deadline(
    make_app: AppFactory,
) -> None:
    """The response goes out, however long the callback takes."""
    app = make_app(APITASK_TIMEOUT=0.05, APITASK_MAX_WORKERS=1)
    stuck, callback = Gate(), Gate()

    @app.get("/")
    def index() -> str:
        run(stuck)
        run(str).add_done_callback(callback)
        return "ok"

    assert in_time(app.test_client().get, "/").text == "ok"
    assert callback.begun.wait(PATIENCE)
    callback.opened.set()
    stuck.opened.set()
    pool = app.extensions["apitask"].pool
    wait_until(lambda: not pool._busy)
    assert threading.current_thread() not in callback.threads


def test_callback_that_is_added_after_the_request(make_app: AppFactory) -> None:
    """It still gets a thread of the pool, and nobody waits for it."""
    app, callback = make_app(), Gate()
    futures: list[TaskFuture[str]] = []

    @app.get("/")
    def index() -> str:
        futures.append(run(str))
        return "ok"

    app.test_client().get("/")
    futures[0].add_done_callback(callback)
    assert callback.begun.wait(PATIENCE)
    callback.opened.set()
    wait_until(lambda: not app.extensions["apitask"].pool._busy)
    assert threading.current_thread() not in callback.threads


@pytest.mark.parametrize("enabled", [True, False], ids=["task", "plain call"])
def test_callback_that_is_async(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, enabled: bool
) -> None:
    """It runs, and if it raises, that is logged, in a plain call too."""
    app = make_app(APITASK_ENABLED=enabled)
    called: list[object] = []

    async def call_back(future: TaskFuture[int]) -> None:
        await asyncio.sleep(0)
        called.append(future.result())
        raise LookupError

    @app.get("/")
    def index() -> str:
        run(int).add_done_callback(call_back)  # type: ignore[arg-type]
        return "ok"

    assert app.test_client().get("/").text == "ok"
    assert called == [0]
    (record,) = caplog.records
    assert "call_back' of GET / failed" in record.getMessage()


def test_callback_that_is_added_late_counts_as_a_waiting_thread(
    make_app: AppFactory,
) -> None:
    """An event loop that waits for it goes on, though no thread is free."""
    app = make_late(make_app())

    async def wait_for(future: TaskFuture[int]) -> int:
        return await asyncio.wrap_future(future)

    with app.app_context(), open_scope() as scope:
        future = run(int)
        future.result(PATIENCE)
        assert in_time(asyncio.run, wait_for(future)) == 0
        scope.wait()
        assert scope.waiters == 0


def test_callback_in_a_forked_child_or_after_the_end(make_app: AppFactory) -> None:
    """A scope that has ended calls nothing, and says so."""
    app = make_app()

    with app.app_context(), open_scope() as scope:
        run(int)

    assert not scope.call_back(print)
    scope._pool.generation += 1
    assert not scope.call_back(print)
