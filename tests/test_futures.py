from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import types
import typing as t
import weakref

import pytest
from conftest import PATIENCE

from flask_apitask import futures
from flask_apitask.futures import TaskFuture

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Of a thread that has to be woken: it sees by itself, later, that the future is done.
LONG = 2 * PATIENCE

Future: t.TypeAlias = "concurrent.futures.Future[t.Any]"


@pytest.fixture
def executor() -> cabc.Iterator[concurrent.futures.Executor]:
    """Give the test threads that wait for its futures."""
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        yield executor


class Sleepers:
    """Count the threads that are about to sleep until a future is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._asleep = asleep = threading.Semaphore(0)

        class Condition(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:
                # The future's lock is held until the thread sleeps.
                asleep.release()
                return super().wait(timeout)

        # Not in the library's own module: the pool of these threads uses that, too.
        names = types.SimpleNamespace(RLock=threading.RLock, Condition=Condition)
        monkeypatch.setattr(futures, "threading", names)

    def await_one(self) -> None:
        """Return when one more thread holds its future's lock, about to sleep."""
        assert self._asleep.acquire(timeout=PATIENCE)


def test_has_the_attributes_of_the_standard_future() -> None:
    """What the standard library's methods read is set as its own class sets it."""
    future: Future = TaskFuture()
    standard_future: Future = concurrent.futures.Future()
    ours, standard = vars(future), vars(standard_future)
    assert ours.keys() == standard.keys()
    del ours["_condition"], standard["_condition"]
    assert ours == standard


def test_unawaited_future_has_no_condition_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A future that no thread waits for is completed and read without one."""
    monkeypatch.delattr(threading, "Condition")
    future = TaskFuture[int]()
    assert future.set_running_or_notify_cancel()
    future.set_result(1)
    assert future.result() == 1


def test_all_waiting_threads_are_woken(
    executor: concurrent.futures.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for the result, or the exception, are woken by the outcome."""
    sleepers = Sleepers(monkeypatch)
    future = TaskFuture[int]()
    reads = (future.result, future.result, future.exception)
    waits = [executor.submit(read, LONG) for read in reads]

    for _ in waits:
        sleepers.await_one()

    future.set_result(1)
    assert [wait.result(PATIENCE) for wait in waits] == [1, 1, None]


def test_nothing_refers_to_a_future_that_was_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes, with all that it has, without the garbage collector."""
    sleepers = Sleepers(monkeypatch)
    future = TaskFuture[int]()
    thread = threading.Thread(target=future.result, args=[LONG], daemon=True)
    thread.start()
    sleepers.await_one()
    future.set_result(1)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    gc.collect()
    gc.disable()

    try:
        reference = weakref.ref(future._condition)
        del future
        assert reference() is None
    finally:
        gc.enable()


def test_waiting_thread_learns_of_the_cancellation(
    executor: concurrent.futures.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits is told when the future is cancelled."""
    sleepers = Sleepers(monkeypatch)
    future = TaskFuture[int]()
    wait = executor.submit(future.result, LONG)
    sleepers.await_one()
    assert future.cancel()

    with pytest.raises(concurrent.futures.CancelledError):
        wait.result(PATIENCE)


@pytest.mark.parametrize("read", [TaskFuture.result, TaskFuture.exception])
def test_wait_ends_at_the_timeout(
    read: cabc.Callable[[Future, float], object],
) -> None:
    """A wait that is too short raises, and the future goes on."""
    future = TaskFuture[int]()

    for _ in range(2):
        with pytest.raises(concurrent.futures.TimeoutError):
            read(future, 0.001)

    future.set_result(1)
    assert future.result() == 1


def test_module_functions_wait_for_it(executor: concurrent.futures.Executor) -> None:
    """``wait`` and ``as_completed`` take it, with standard futures or without."""
    ours = TaskFuture[int]()
    mixed: list[Future] = [ours, executor.submit(int, "2")]
    first = next(concurrent.futures.as_completed(mixed, PATIENCE))
    assert first.result() == 2
    executor.submit(ours.set_result, 1)
    done, _ = concurrent.futures.wait(mixed, PATIENCE)
    assert {future.result() for future in done} == {1, 2}


def test_event_loop_waits_for_it(executor: concurrent.futures.Executor) -> None:
    """``asyncio.wrap_future`` takes it."""
    future = TaskFuture[int]()

    async def await_it() -> int:
        wrapped = asyncio.wrap_future(future)
        executor.submit(future.set_result, 1)
        return await asyncio.wait_for(wrapped, PATIENCE)

    assert asyncio.run(await_it()) == 1


def test_lock_is_reentrant() -> None:
    """A signal handler may look at a future that its thread has the lock of."""
    future = TaskFuture[int]()

    with future._condition:
        assert not future.done()
        assert "pending" in repr(future)
