from __future__ import annotations

import functools
import typing as t

import pytest
from conftest import PATIENCE
from interleaving import explore
from interleaving import Schedule
from late_threads import in_time
from scopes import Gate

from flask_apitask.closing import Closing
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.scope import TaskScope

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.executor.future import TaskFuture

SEEDS = range(300)


def check_settled(
    scope: TaskScope,
    caplog: pytest.LogCaptureFixture,
    late: list[bool],
    futures: list[TaskFuture[t.Any] | None],
) -> None:
    """Check that a scope holds nothing, and that no task ran after its end."""
    assert not scope._held
    assert caplog.messages == []
    assert late == []
    assert all(future is None or future.done() for future in futures)


@pytest.mark.parametrize("failure", [None, "it failed"])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_every_task_starts_once_or_is_dropped(
    caplog: pytest.LogCaptureFixture, size: int, failure: str | None
) -> None:
    """Others hold, commit and roll back while a scope is settled and ends.

    What is started was awaited by the end of the scope, and nothing stays held.
    """

    def set_up(schedule: Schedule) -> cabc.Callable[[], None]:
        scope = TaskScope(ThreadPool(size), 1)
        ran: list[str] = []
        late: list[str] = []
        ended: list[bool] = []
        futures: dict[str, TaskFuture[t.Any]] = {}

        def hold(name: str, *, for_success: bool) -> None:
            def task() -> None:
                schedule.pause()
                ran.append(name)
                late.extend([name] * len(ended))

            future = scope.hold(task, (), {}, for_success=for_success)

            if future is None:
                # As run() does then.
                ran.append(name)
            else:
                futures[name] = future

        for name in ("committed", "rolled back", "forgotten"):
            hold(name, for_success=False)

        hold("early", for_success=True)

        def end() -> None:
            scope.settle(failure)
            scope.end()
            ended.append(True)

        def spawn(fn: cabc.Callable[[], object]) -> None:
            # The end takes many steps, and each of them is to meet the others.
            def wait_and_call() -> None:
                for _ in range(schedule.choose(range(20))):
                    schedule.pause()

                fn()

            schedule.spawn(wait_and_call)

        schedule.spawn(end)
        spawn(lambda: hold("success", for_success=True))
        spawn(lambda: hold("commit", for_success=False))
        spawn(lambda: scope.start(futures["committed"]))
        spawn(lambda: scope.drop("a test", futures["rolled back"]))

        def check() -> None:
            assert not scope._held
            # Nor is it queued once it is dropped, which is logged.
            assert caplog.messages == []
            assert late == []
            assert sorted(ran) == sorted(set(ran))
            assert all(future.done() for future in futures.values())
            gone = {name for name, future in futures.items() if future.cancelled()}
            assert gone.isdisjoint(ran)
            assert {"rolled back", "forgotten"} <= gone
            # A commit may come too late, and a success may not come.
            may = {"committed", "commit", "rolled back", "forgotten"}
            assert gone <= may | ({"early", "success"} if failure else set())
            assert ("early" in ran) == (failure is None)

            if failure is not None:
                assert "success" not in ran

        return check

    explore(set_up, SEEDS)


@pytest.mark.parametrize("others", ["success commit", "success", "start drop", "start"])
@pytest.mark.parametrize("size", [0, 1])
def test_few_meet_the_end(
    caplog: pytest.LogCaptureFixture, size: int, others: str
) -> None:
    """Fewer threads are deeper in each other: what is held first, and what starts.

    The end looks without the lock whether there is anything, and misses nothing.
    """

    def set_up(schedule: Schedule) -> cabc.Callable[[], None]:
        scope = TaskScope(ThreadPool(size), 1)
        ended: list[bool] = []
        late: list[bool] = []
        futures: list[t.Any] = []

        def hold(*, for_success: bool) -> None:
            task = functools.partial(late.extend, ended)
            futures.append(scope.hold(task, (), {}, for_success=for_success))

        if "start" in others:
            hold(for_success=False)

        calls: dict[str, cabc.Callable[[], object]] = {
            "success": lambda: hold(for_success=True),
            "commit": lambda: hold(for_success=False),
            "start": lambda: scope.start(futures[0]),
            "drop": lambda: scope.drop("a test", futures[0]),
        }

        def end() -> None:
            scope.settle(None)
            scope.end()
            ended.append(True)

        def call(name: str) -> None:
            for _ in range(schedule.choose(range(8))):
                schedule.pause()

            calls[name]()

        schedule.spawn(end)

        for name in others.split():
            schedule.spawn(functools.partial(call, name))

        return lambda: check_settled(scope, caplog, late, futures)

    explore(set_up, SEEDS)


@pytest.mark.parametrize("failure", [None, "the stream failed"])
@pytest.mark.parametrize("size", [0, 1])
def test_the_end_of_a_stream(
    caplog: pytest.LogCaptureFixture, size: int, failure: str | None
) -> None:
    """A task deferred while a stream ends is waited for once more, if it starts."""

    def set_up(schedule: Schedule) -> cabc.Callable[[], None]:
        scope, closing = TaskScope(ThreadPool(size), 1), Closing(False, is_stream=True)
        ended: list[bool] = []
        late: list[bool] = []
        futures: list[TaskFuture[t.Any] | None] = []

        # As the end of the request does, before the stream.
        scope.end()
        closing.add(scope, waited_for=True)

        def hold() -> None:
            task = functools.partial(late.extend, ended)
            futures.append(scope.hold(task, (), {}, for_success=True))

        def close() -> None:
            closing.close(failure)
            ended.append(True)

        schedule.spawn(hold)
        schedule.spawn(close)

        return lambda: check_settled(scope, caplog, late, futures)

    explore(set_up, SEEDS)


def test_a_request_that_is_withdrawn_is_not_on_its_way() -> None:
    """A task that starts once its scope is closed is served, however busy the pool."""
    pool = ThreadPool(1)
    pool.tasks_are_small = False
    first, last = Gate(), Gate()
    before, scope, after = (TaskScope(pool, 2) for _ in range(3))
    before.submit(first)
    done = [scope.submit(bool)]
    after.submit(last)
    # The scope has queued twice, but the thread does both tasks when it comes first.
    done.append(scope.submit(bool))
    held = scope.hold(bool, (), {}, for_success=True)
    assert held is not None
    first.opened.set()
    assert last.begun.wait(PATIENCE)
    assert all(future.done() for future in done)
    scope.shutdown(wait=False)
    assert scope.settle(None)
    in_time(scope.end)
    assert held.result(0) is False
    last.opened.set()
    before.end()
    after.end()


def test_a_commit_while_others_are_cancelled() -> None:
    """A task that it starts is not taken for one of them, and gets a thread."""
    pool, gate = ThreadPool(1), Gate()
    before, scope = TaskScope(pool, 1), TaskScope(pool, 1)
    before.submit(gate)
    held = scope.hold(bool, (), {}, for_success=False)
    assert held is not None
    queued = scope.submit(bool)
    queued.add_done_callback(lambda _: scope.start(held))
    scope.shutdown(wait=False, cancel_futures=True)
    assert queued.cancelled()
    gate.opened.set()
    in_time(scope.end)
    assert held.result(0) is False
    before.end()
