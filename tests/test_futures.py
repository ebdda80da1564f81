from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
import typing as t
import weakref

import pytest
from conftest import PATIENCE
from conftest import wait_until
from scopes import fail
from scopes import Gate
from scopes import join
from scopes import make_scope
from scopes import no_collector
from scopes import nothing
from scopes import Payload
from scopes import RefusedPool
from scopes import start

from flask_apitask.executor.future import TaskFuture
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.runner import Runner

if t.TYPE_CHECKING:
    import collections.abc as cabc

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

READS: list[cabc.Callable[[t.Any, float], object]] = [
    TaskFuture.result,
    TaskFuture.exception,
]


@pytest.mark.parametrize("read", READS)
def test_wait_ends_at_the_timeout(read: cabc.Callable[[t.Any, float], object]) -> None:
    """A wait that is too short raises, and the task keeps running."""
    gate = Gate()

    with make_scope() as scope:
        future = scope.submit(gate)

        for _ in range(2):
            with pytest.raises(concurrent.futures.TimeoutError):
                read(future, 0.001)

        gate.opened.set()
        assert future.result(PATIENCE) == "through"
        assert scope.waiters == 0


def test_all_waiting_threads_are_woken() -> None:
    """Threads that wait for the result, or the exception, are woken by the outcome."""
    gate = Gate()
    results: list[object] = []

    with make_scope() as scope:
        future = scope.submit(gate)
        reads = (future.result, future.result, future.exception)
        threads = [start(lambda read=read: results.append(read())) for read in reads]
        wait_until(lambda: scope.waiters == 3)
        gate.opened.set()
        join(*threads)

    assert sorted(map(str, results)) == ["None", "through", "through"]


def test_cancelled_task_is_not_waited_for() -> None:
    """A thread that waits is told when the future is cancelled."""
    gate = Gate()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            future.result()
        except concurrent.futures.CancelledError as error:
            errors.append(error)

    with make_scope(1) as scope:
        scope.submit(gate)
        assert gate.begun.wait(PATIENCE)
        future = scope.submit(nothing)
        waiting = start(wait)
        wait_until(lambda: scope.waiters == 1)
        assert future.cancel()
        join(waiting)
        gate.opened.set()

    assert len(errors) == 1


async def _wait_for(future: TaskFuture[str]) -> str:
    return await future


def test_coroutine_waits_for_it() -> None:
    """``await`` blocks no event loop, and ends with the task's result or exception."""

    async def main() -> str:
        gate = Gate()
        failing = scope.submit(fail, LookupError("task"))
        waiting = asyncio.ensure_future(_wait_for(scope.submit(gate)))

        with pytest.raises(LookupError, match="task"):
            await failing

        gate.opened.set()
        return await asyncio.wait_for(waiting, PATIENCE)

    with make_scope(pool=ThreadPool(0)) as scope:
        assert asyncio.run(main()) == "through"
        assert scope.waiters == 0


def test_exception_goes_with_its_future() -> None:
    """Reading the result of a failed task leaves no reference cycle."""

    class Failure(Exception):
        pass

    def raise_failure() -> t.NoReturn:
        raise Failure

    with no_collector(), make_scope() as scope:
        future = scope.submit(raise_failure)

        try:
            future.result(PATIENCE)
        except Failure as error:
            reference = weakref.ref(error)

        del future
        wait_until(lambda: reference() is None)


@pytest.mark.parametrize("how", ["thread", "inline", "cancelled", "done"])
@pytest.mark.parametrize("error_type", [ValueError, SystemExit, KeyboardInterrupt])
def test_callback_that_raises(
    error_type: type[BaseException], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A done callback that raises is logged, and holds up nobody.

    The standard library lets through what is no ``Exception``.
    """
    gate = Gate()
    called: list[object] = []

    def add_callbacks() -> None:
        future.add_done_callback(lambda _: fail(error_type("callback")))
        future.add_done_callback(called.append)

    with make_scope(1, RefusedPool() if how == "inline" else ThreadPool(1)) as scope:
        if how == "inline":
            # Its own task adds the callbacks before it is done.
            future: TaskFuture[None]
            future = TaskFuture(Runner(), scope, (nothing, (), {}, 0.0))
            add_callbacks()
            future.run("inline")
        else:
            scope.submit(gate)
            future = scope.submit(nothing)

            if how != "done":
                add_callbacks()

            if how == "cancelled":
                future.cancel()

            gate.opened.set()
            scope.wait()

            if how == "done":
                add_callbacks()

        assert scope.submit(len, "abc").result(PATIENCE) == 3

    assert called == [future]
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert (record.name, record.getMessage()) == (
        "flask_apitask",
        "A done callback failed.",
    )
    assert record.exc_info
    assert isinstance(record.exc_info[1], error_type)


def test_task_and_callback_find_context_variables() -> None:
    """The task finds those of its submission, and a callback those of the task.

    What one of them sets stays its own.
    """
    found: list[str] = []

    def work(*args: object) -> None:
        found.append(variable.get())
        variable.set("a callback's" if args else "the task's")

    with make_scope() as scope:
        variable.set("at submission")
        future = scope.submit(work)
        variable.set("later")

        for _ in range(2):
            future.add_done_callback(work)

        scope.wait()
        future.add_done_callback(work)
        assert variable.get() == "later"

    assert found == ["at submission"] + ["the task's"] * 3


def test_context_of_a_submission_goes_with_the_future() -> None:
    """What context variables held is not kept by the scope or its threads."""
    payload_variable: contextvars.ContextVar[Payload] = contextvars.ContextVar("other")

    def submit() -> weakref.ref[Payload]:
        payload = Payload()
        payload_variable.set(payload)
        scope.submit(nothing)
        return weakref.ref(payload)

    with no_collector(), make_scope() as scope:
        reference = contextvars.copy_context().run(submit)
        scope.wait()
        wait_until(lambda: reference() is None)


def test_outcome_that_somebody_else_has_set(caplog: pytest.LogCaptureFixture) -> None:
    """The thread goes on with the next task, and an ERROR says what went wrong."""
    begun, gate = threading.Event(), threading.Event()

    def hold() -> bool:
        """Run until the test says so."""
        begun.set()
        return gate.wait(PATIENCE)

    with make_scope(max_workers=1) as scope:
        scope.submit(hold)
        assert begun.wait(PATIENCE)
        scope.submit(int).set_result(3)
        last = scope.submit(str)
        gate.set()
        assert last.result(PATIENCE) == ""

    assert "could not be set" in caplog.text
    # The record refers to the future, and that to the threads.
    caplog.clear()
