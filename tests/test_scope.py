from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import gc
import math
import threading
import typing as t
import warnings
import weakref

import pytest
from conftest import PATIENCE
from conftest import wait_until
from interleaving import GapLock
from late_threads import in_time
from scopes import fail
from scopes import Gate
from scopes import join
from scopes import make_scope
from scopes import no_collector
from scopes import nothing
from scopes import Payload
from scopes import RefusedPool
from scopes import start

from flask_apitask import ScopeClosed
from flask_apitask.executor.future import TaskFuture
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.runner import Runner
from flask_apitask.executor.scope import TaskScope

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.executor.runner import How
    from flask_apitask.executor.runner import Work
    from flask_apitask.executor.worker import Worker

WORK: Work = (bool, (), {}, 0.0)

CONTAINED = [
    ValueError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
]

# Where tasks run: on a thread of the pool, on one for a scope that is waited for alone,
# and inline.
POOLS: list[cabc.Callable[[], ThreadPool]] = [
    functools.partial(ThreadPool, 2),
    functools.partial(ThreadPool, 0),
    RefusedPool,
]

# Whatever waits for a future's task.
WAITS: dict[str, cabc.Callable[[TaskScope, t.Any], object]] = {
    "wait": lambda scope, future: scope.wait(),
    "wait with a timeout": lambda scope, future: scope.wait(PATIENCE),
    "end": lambda scope, future: scope.end(),
    "shutdown": lambda scope, future: scope.shutdown(),
    "block": lambda scope, future: scope.__exit__(None, None, None),
    "result": lambda scope, future: future.result(),
    "exception": lambda scope, future: future.exception(),
    "await": lambda scope, future: asyncio.run(_await(future)),
}


async def _await(future: t.Any) -> t.Any:
    return await future


class Greeting:
    """A task with a name."""

    name = "greeting"

    def run(self) -> str:
        return "hello"


def test_submit_returns_the_future() -> None:
    """A task's result is in the future, and every argument belongs to the task."""

    def collect(*args: object, **kwargs: object) -> t.Any:
        return args, kwargs

    with make_scope() as scope:
        keywords: dict[str, t.Any] = {"self": 1, "fn": 2, "timeout": 3, "task": 4}
        future = scope.submit(collect, "fn", **keywords)
        assert future.result(PATIENCE) == (("fn",), keywords)
        greeting: t.Any = Greeting()
        assert scope.submit(greeting).result(PATIENCE) == "hello"


def test_submit_refuses_what_is_no_task() -> None:
    """What can't be called is refused in the caller, and nothing is queued."""
    with make_scope() as scope:
        no_task: t.Any = 42

        with pytest.raises(TypeError, match=r"^A task is a callable, .*not 42\."):
            scope.submit(no_task)

        assert repr(scope) == "<TaskScope open queued=0 running=0 max_workers=2>"


def test_submit_after_the_end() -> None:
    """A scope that has ended refuses a task, and says which one and what to do."""
    with make_scope() as scope:
        pass

    with pytest.raises(ScopeClosed) as caught:
        scope.submit(nothing)

    assert str(caught.value) == (
        "Task 'scopes.nothing' was submitted to a scope that has ended. Submit it"
        " before the request or the 'with' block ends, or use run(), which then calls"
        " the task on the spot."
    )
    assert scope.closed


def test_scope_ends_while_it_is_given_a_task() -> None:
    """The name of a task is the user's code, and may even end the scope."""

    class Nosy:
        @property
        def name(self) -> str:
            in_time(scope.end)
            return "nosy"

        def run(self) -> None: ...

    scope = make_scope()
    nosy: t.Any = Nosy()

    with pytest.raises(ScopeClosed, match=r"^Task 'nosy' was"):
        scope.submit(nosy)

    assert repr(scope) == "<TaskScope closed queued=0 running=0 max_workers=2>"


@pytest.mark.parametrize("wait", WAITS)
def test_waiting_thread_runs_no_task(wait: str) -> None:
    """Whatever waits, and though no thread of the pool is free: another one runs it.

    One thread waits, so one is started, and it ends with the work.
    """
    before = threading.active_count()
    scope = make_scope(4, ThreadPool(0))
    threads: list[threading.Thread] = []
    counts: list[int] = []

    def work() -> None:
        threads.append(threading.current_thread())
        counts.append(threading.active_count() - before)

    futures = [scope.submit(work) for _ in range(20)]
    WAITS[wait](scope, futures[-1])
    scope.end()
    assert len(threads) == 20
    assert threading.current_thread() not in threads
    assert set(counts) == {1}
    join(*threads)


def test_one_more_thread_for_each_that_waits() -> None:
    """However many tasks there are, no more threads are started than are waiting."""
    before = threading.active_count()
    gate = Gate()
    scope = make_scope(8, ThreadPool(0))
    futures = [scope.submit(gate) for _ in range(8)]

    waiting = []

    for count in (1, 2, 3):
        waiting.append(start(futures[-1].result))
        wait_until(lambda count=count: len(scope._running) == count)  # type: ignore[misc]
        # As many as wait.
        assert threading.active_count() - before == 2 * count

    # It is asked for more of them, in vain.
    scope.submit(gate)
    assert len(scope._running) == 3
    assert threading.active_count() - before == 6
    gate.opened.set()
    join(*waiting)
    scope.end()


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("max_workers", [1, 2])
def test_nested_scopes_end(size: int, max_workers: int) -> None:
    """Tasks that wait for scopes of their own come to their end, at any depth."""
    pool = ThreadPool(size)
    leaves: list[int] = []

    def nest(depth: int) -> None:
        with make_scope(max_workers, pool) as scope:
            for index in range(2):
                if depth:
                    scope.submit(nest, depth - 1)
                else:
                    scope.submit(leaves.append, index)

    in_time(nest, 5)
    assert len(leaves) == 64


def test_wait_begins_while_a_thread_is_requested() -> None:
    """A scope that has not queued yet when a thread begins to wait is seen to."""
    waiting: list[threading.Thread] = []
    looked = threading.Event()

    class Pool(ThreadPool):
        def withdraw(self, scope: t.Any) -> int:
            found = super().withdraw(scope)
            looked.set()
            return found

    class Slow(collections.deque[t.Any]):
        def append(self, scope: t.Any) -> None:
            waiting.append(start(scope.wait))
            assert looked.wait(PATIENCE)
            super().append(scope)

    pool = Pool(0)
    pool._waiting = Slow()
    scope = make_scope(pool=pool)
    scope.submit(nothing)
    join(*waiting)
    scope.end()


def test_wait_begins_while_an_extra_thread_leaves() -> None:
    """A thread that was started for another wait, and counts, does not leave then."""
    requests: list[TaskScope] = []
    waiting: list[threading.Thread] = []

    class Pool(ThreadPool):
        def request(self, scope: t.Any) -> bool:
            comes = super().request(scope)
            requests.append(scope)
            return comes

    def wait_once_more() -> None:
        wait_until(lambda: scope.waiters == 0)
        waiting.append(start(scope.submit(nothing).result))
        # For each task, and again by each of those that wait.
        wait_until(lambda: len(requests) == 4)

    scope = make_scope(1, Pool(0))
    scope.submit(nothing)
    # The thread gives the lock back to begin, and to give its slot back.
    lock: t.Any = GapLock(2, wait_once_more, "apitask_0")
    scope._lock = lock
    scope.wait()
    wait_until(lambda: bool(waiting))
    join(*waiting)
    scope.end()


def test_extra_thread_that_stays_counts_as_any_other() -> None:
    """A thread started for a wait may be the one of the pool that is left over.

    Where that is busy, the next scope that is waited for has a thread started, too.
    """
    pool = ThreadPool(1)
    gates = [Gate() for _ in range(3)]

    with make_scope(pool=pool) as busy, make_scope(pool=pool) as scope:
        busy.submit(gates[0])
        assert gates[0].begun.wait(PATIENCE)
        waiting = start(scope.submit(gates[1]).result)
        assert gates[1].begun.wait(PATIENCE)
        gates[0].opened.set()
        wait_until(lambda: len(pool._busy) == 1)
        gates[1].opened.set()
        join(waiting)
        wait_until(lambda: len(pool._idle) == 1)
        scope.submit(gates[2])
        assert gates[2].begun.wait(PATIENCE)
        assert gates[2].threads == gates[1].threads
        assert in_time(scope.submit(len, "abc").result) == 3
        gates[2].opened.set()


def test_full_pool_of_stuck_tasks() -> None:
    """Even if all threads are stuck, the tasks of a scope with a waiter are done."""
    pool, gate = ThreadPool(2), Gate()
    stuck = make_scope(2, pool)
    futures = [stuck.submit(gate) for _ in range(2)]
    wait_until(lambda: len(stuck._running) == 2)

    for wait in WAITS.values():
        scope = make_scope(1, pool)
        done = [scope.submit(len, "abc") for _ in range(3)]
        in_time(wait, scope, done[-1])
        assert done[-1].result(0) == 3
        scope.end()

    assert not any(future.done() for future in futures)
    gate.opened.set()
    stuck.end()


@pytest.mark.parametrize("make_pool", POOLS)
def test_one_worker_runs_in_order(make_pool: cabc.Callable[[], ThreadPool]) -> None:
    """With one worker one task runs at a time, in order."""
    order: list[int] = []

    with make_scope(1, make_pool()) as scope:
        for index in range(50):
            scope.submit(order.append, index)

        scope.wait()
        assert order == list(range(50))


def test_tasks_run_side_by_side_up_to_the_cap() -> None:
    """As many tasks as the cap allows run at once, and never more."""
    cap = 3
    meeting = threading.Barrier(cap)
    lock = threading.Lock()
    running = most = 0

    def meet() -> None:
        nonlocal running, most

        with lock:
            running += 1
            most = max(most, running)

        meeting.wait(PATIENCE)

        with lock:
            running -= 1

        meeting.wait(PATIENCE)

    with make_scope(cap, ThreadPool(8)) as scope:
        futures = [scope.submit(meet) for _ in range(cap * 4)]
        scope.wait()
        assert [future.exception(0) for future in futures] == [None] * cap * 4

    assert most == cap


def test_small_tasks_get_more_threads_once_they_take_long() -> None:
    """A wait delays waking more threads, but not for long."""
    meeting = threading.Barrier(3)

    with make_scope(3) as scope:
        for _ in range(3):
            scope.submit(meeting.wait, PATIENCE)

        scope.wait()
        assert not meeting.broken


def test_wait_is_a_barrier() -> None:
    """Tasks that are submitted during a wait don't prolong it, and still run."""
    later = Gate()

    with make_scope(1) as scope:
        first = scope.submit(lambda: scope.submit(later))
        scope.wait()
        assert first.done()
        assert not later.opened.is_set()
        later.opened.set()
        assert first.result(0).result(PATIENCE) == "through"
        # And may be waited for again.
        scope.wait()


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
def test_wait_times_out(timeout: float) -> None:
    """A wait that is too short says how many tasks are left, and they keep running."""
    gate = Gate()

    with make_scope() as scope:
        future = scope.submit(gate)
        second = scope.submit(gate)
        assert gate.begun.wait(PATIENCE)

        with pytest.raises(TimeoutError) as caught:
            scope.wait(timeout)

        assert str(caught.value) == (
            f"2 of the scope's tasks were not done after {timeout} s."
        )
        gate.opened.set()
        assert future.result(PATIENCE) == second.result(PATIENCE) == "through"
        scope.wait(PATIENCE)


@pytest.mark.parametrize("timeout", [None, math.inf])
def test_threads_wait_for_ever(timeout: float | None) -> None:
    """Every thread that waits is let go when the tasks are done, whenever that is."""
    gate = Gate()

    with make_scope() as scope:
        scope.submit(gate)
        waiting = [start(scope.wait, timeout) for _ in range(3)]
        wait_until(lambda: scope.waiters == 3)
        gate.opened.set()
        join(*waiting)
        # The scope keeps no record of waits that are over.
        assert (scope.waiters, scope._barriers) == (0, [])


def test_empty_wait() -> None:
    """With nothing to wait for, a wait and an end return at once, and start nothing."""
    before = threading.active_count()
    scope = make_scope()
    scope.wait()
    scope.wait(0)
    scope.end()
    scope.end()
    assert threading.active_count() == before


def test_no_thread_to_be_had(caplog: pytest.LogCaptureFixture) -> None:
    """If no thread can be started, the submitting thread runs the tasks, in order.

    One WARNING says so.
    """
    idents: list[int] = []
    hows: list[How] = []

    class Noting(Runner):
        def run(self, *args: t.Any) -> t.Any:
            hows.append(args[-1])
            return super().run(*args)

    with make_scope(1, RefusedPool(), runner=Noting()) as scope:
        for index in range(3):
            future = scope.submit(lambda: idents.append(threading.get_ident()))
            assert future.done()
            assert len(idents) == index + 1

        error = scope.submit(fail, ValueError("its own")).exception(0)
        assert isinstance(error, ValueError)
        # It does not seem to come from the refusal.
        assert error.__context__ is None

    with make_scope(runner=Noting()) as scope:
        scope.submit(nothing)

    assert idents == [threading.get_ident()] * 3
    assert hows == ["inline"] * 4 + ["thread"]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flask_apitask", "WARNING")
    assert record.getMessage() == (
        "No thread can be started for tasks, so they run one after the other where they"
        " are started or waited for: can't start new thread"
    )


@pytest.mark.parametrize(
    ("max_workers", "expected"),
    [(1, ["outer", "end of outer", "inner"]), (2, ["outer", "inner", "end of outer"])],
)
def test_inline_tasks_keep_to_the_cap(max_workers: int, expected: list[str]) -> None:
    """Without threads, a task that submits another one still respects the cap."""
    order: list[str] = []

    with make_scope(max_workers, RefusedPool()) as scope:

        def outer() -> None:
            order.append("outer")
            scope.submit(order.append, "inner")
            order.append("end of outer")

        scope.submit(outer)
        assert order == expected


def test_queued_scope_is_refused_when_it_is_waited_for() -> None:
    """A waiting thread runs what was queued for a thread that can't be started.

    And the next task is not taken for one that a thread is on its way to.
    """
    pool = ThreadPool(0)
    idents: list[int] = []

    with make_scope(1, pool) as scope:
        for _ in range(2):
            scope.submit(lambda: idents.append(threading.get_ident()))
            pool._start = RefusedPool()._start  # type: ignore[method-assign]
            in_time(scope.wait)
            del pool._start

        thread = threading.Thread(target=scope.wait)
        assert len(idents) == 2
        scope.submit(lambda: idents.append(threading.get_ident()))
        thread.start()
        join(thread)
        assert thread.ident not in idents[2:]


class ScarcePool(ThreadPool):
    """A pool that can start one thread and no more."""

    def _start(self, worker: Worker) -> None:
        if next(self._numbers):
            raise RuntimeError("can't start new thread")

        super()._start(worker)


@pytest.mark.parametrize("small", [True, False])
def test_one_thread_serves_where_there_is_no_second(
    small: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As long as one thread comes or serves, no task runs where it is waited for."""
    pool, gate = ScarcePool(4), Gate()
    pool.tasks_are_small = small
    idents: list[int] = []

    def note() -> None:
        idents.append(threading.get_ident())

    with make_scope(4, pool) as scope:
        futures = [scope.submit(gate)] + [scope.submit(note) for _ in range(3)]
        waiting = [start(scope.wait), start(futures[-1].result)]
        wait_until(lambda: scope.waiters == 2)
        scope.submit(note)
        assert idents == []
        gate.opened.set()
        join(*waiting)

    assert idents == [gate.threads[0].ident] * 4
    assert caplog.messages == []


def test_one_of_several_threads_comes() -> None:
    """Of several threads that are lacking, one is enough that a task is left to it."""
    coming = threading.Event()

    class Pool(ThreadPool):
        def request(self, scope: t.Any) -> bool:
            requests.append(scope)
            return len(requests) == 1

    requests: list[TaskScope] = []
    scope = make_scope(4, Pool(4))
    scope._pool.tasks_are_small = False
    # As by a thread that has left them there.
    scope._queue.extend(TaskFuture(Runner(), scope, WORK) for _ in range(2))
    scope._unfinished += 2
    future = scope.submit(coming.set)
    assert len(requests) == 2
    assert not future.done()
    scope.serve("thread")
    assert future.done()
    scope.end()


@pytest.mark.parametrize("make_pool", POOLS)
@pytest.mark.parametrize("error_type", CONTAINED)
def test_exceptions_are_contained(
    error_type: type[BaseException], make_pool: cabc.Callable[[], ThreadPool]
) -> None:
    """An exception of any class ends its task and nothing else."""
    error = error_type("contained")

    with make_scope(1, make_pool()) as scope:
        failing = scope.submit(fail, error)
        following = scope.submit(len, "abc")
        scope.wait()
        assert failing.exception(0) is error
        # It counts as done.
        assert failing.task is None
        assert following.result(0) == 3


def test_cancelled_future_is_skipped() -> None:
    """A future that is cancelled in time never runs, and nobody waits for it."""
    done: list[str] = []

    with make_scope(1, ThreadPool(0)) as scope:
        futures = [scope.submit(done.append, name) for name in "abc"]
        assert futures[1].cancel()
        scope.wait()
        assert done == ["a", "c"]
        assert concurrent.futures.wait(futures, 0).not_done == set()
        assert not futures[0].cancel()


def test_shutdown_cancels_what_is_queued() -> None:
    """With ``cancel_futures`` the running task ends, and the others never begin."""
    gate = Gate()
    scope = make_scope(1, timeout=0.0)
    running = scope.submit(gate)
    assert gate.begun.wait(PATIENCE)
    queued = [scope.submit(nothing) for _ in range(3)]
    scope.shutdown(wait=False, cancel_futures=True)
    assert [future.cancelled() for future in queued] == [True] * 3
    assert not running.done()
    assert repr(scope) == "<TaskScope closed queued=0 running=1 max_workers=1>"
    gate.opened.set()
    # The timeout of the scope is one of its end, not of a shutdown.
    scope.shutdown()
    scope.shutdown()
    assert running.result(0) == "through"


def test_block_waits_when_it_raises() -> None:
    """The tasks of a ``with`` block are done when it is left by an exception too."""
    done: list[int] = []

    def block() -> None:
        with make_scope(pool=ThreadPool(0)) as scope:
            scope.submit(done.append, 1)
            raise LookupError("block")

    with pytest.raises(LookupError, match="block"):
        block()

    assert done == [1]


def test_it_is_an_executor() -> None:
    """``concurrent.futures`` and ``run_in_executor`` work as with any executor."""

    async def main(scope: TaskScope) -> int:
        loop = asyncio.get_running_loop()
        gate = Gate()
        running = loop.run_in_executor(scope, gate)
        queued = loop.run_in_executor(scope, fail, AssertionError("it began"))
        queued.cancel()
        gate.opened.set()
        assert await asyncio.wait_for(running, PATIENCE) == "through"

        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(queued, PATIENCE)

        answer = loop.run_in_executor(scope, len, "abc")
        return await asyncio.wait_for(answer, PATIENCE)

    with make_scope(1) as scope:
        futures = [scope.submit(pow, 2, index) for index in range(10)]
        finished = concurrent.futures.as_completed(futures, PATIENCE)
        assert sorted(future.result() for future in finished) == [
            2**index for index in range(10)
        ]
        assert concurrent.futures.wait(futures, PATIENCE).not_done == set()
        assert list(scope.map(pow, [2, 3], [3, 2], timeout=PATIENCE)) == [8, 9]
        assert asyncio.run(main(scope)) == 3


@pytest.mark.parametrize("make_pool", POOLS)
@pytest.mark.parametrize("outcome", ["result", "exception", "cancelled"])
def test_wait_leaves_no_reference_to_a_task(
    outcome: str, make_pool: cabc.Callable[[], ThreadPool]
) -> None:
    """After a wait, the scope keeps no argument alive.

    A result or an exception goes with its future, and with that all of its frames.
    """

    class Failure(Exception):
        pass

    def work(payload: Payload, *, extra: Payload) -> Payload:
        if outcome == "exception":
            raise Failure

        return Payload()

    with no_collector(), make_scope(1, make_pool()) as scope:
        for _ in range(20):
            argument, extra = Payload(), Payload()
            references = [weakref.ref(argument), weakref.ref(extra)]
            future = scope.submit(work, argument, extra=extra)
            del argument, extra
            cancelled = outcome == "cancelled" and future.cancel()
            scope.wait()

            if not cancelled:
                error = future.exception(0)
                result = weakref.ref(t.cast("Failure", error or future.result(0)))
                del error, future
                # The thread is about to give back the slot.
                wait_until(lambda result=result: result() is None)  # type: ignore[misc]

            assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("cancel", [False, True])
def test_thread_on_its_way_home_holds_no_task(cancel: bool) -> None:
    """A wait may be over before the thread has left: it refers to nothing by then."""
    home = threading.Event()
    pool = ThreadPool(1)
    gate = Gate()

    with no_collector(), make_scope(pool=pool) as busy, make_scope(pool=pool) as scope:
        busy.submit(gate)
        payload = Payload()
        reference = weakref.ref(payload)
        future = scope.submit(bool, payload)

        if cancel:
            future.cancel()

        del payload, future
        # The thread gives the lock back to begin, and to give its slot back.
        pause = functools.partial(home.wait, PATIENCE)
        scope._lock = GapLock(2, pause, "apitask_0")  # type: ignore[assignment]
        gate.opened.set()
        wait_until(lambda: not scope._unfinished)
        scope.wait(PATIENCE)
        assert reference() is None
        assert not home.is_set()
        home.set()


def test_scope_is_in_no_cycle() -> None:
    """A scope goes with its last reference, and its threads go with it."""
    with no_collector():
        gone, threads_gone = threading.Event(), threading.Event()
        pool = ThreadPool(2)
        weakref.finalize(pool, threads_gone.set)
        scope = make_scope(pool=pool)
        weakref.finalize(scope, gone.set)

        for _ in range(20):
            scope.submit(nothing)

        scope.end()
        del scope, pool
        # A thread that has just run the last task may still be on its way home.
        assert gone.wait(PATIENCE)
        assert threads_gone.wait(PATIENCE)


def test_scope_that_has_ended_waits_for_no_thread() -> None:
    """While no thread is free, nothing keeps a scope that needs none any more."""
    pool = ThreadPool(1)
    pool.tasks_are_small = False
    first, second = Gate(), Gate()
    scope = make_scope(2, pool)

    with make_scope(pool=pool) as busy, make_scope(pool=pool) as other:
        busy.submit(first)
        assert first.begun.wait(PATIENCE)
        scope.submit(nothing)
        other.submit(second)
        # The thread that comes for the first task does this one as well.
        future = scope.submit(nothing)
        first.opened.set()
        assert second.begun.wait(PATIENCE)
        assert future.done()
        scope.end()
        assert scope not in pool._waiting
        second.opened.set()


@pytest.mark.parametrize("end", [TaskScope.shutdown, TaskScope.end])
def test_scope_that_is_shut_down_waits_for_no_thread(
    end: cabc.Callable[[TaskScope], None],
) -> None:
    """A full pool keeps no scope whose tasks are done or cancelled."""
    pool = ThreadPool(1)
    pool.tasks_are_small = False
    gate = Gate()

    with make_scope(pool=pool) as busy:
        busy.submit(gate)
        assert gate.begun.wait(PATIENCE)
        scope, cancelled = make_scope(2, pool), make_scope(2, pool)

        for _ in range(4):
            scope.submit(nothing)
            cancelled.submit(nothing)

        # One of them is made anew for the thread that waits.
        end(scope)
        assert scope not in pool._waiting
        assert cancelled in pool._waiting
        cancelled.shutdown(wait=False, cancel_futures=True)
        assert not pool._waiting
        gate.opened.set()


def test_scope_that_is_shut_down_while_it_is_served_waits_for_no_thread() -> None:
    """A thread that is requested when there is nothing left to do is not waited for."""
    late: list[TaskScope] = []
    waiting: list[int] = []
    gate = Gate()

    class Ending(ThreadPool):
        def request(self, scope: t.Any) -> bool:
            while late:
                late.pop().shutdown(wait=False, cancel_futures=True)

            return super().request(scope)

    pool = Ending(1)

    with make_scope(pool=pool) as busy:
        busy.submit(gate)
        scope = make_scope(2, pool)
        done = scope.submit(lambda: waiting.append(len(pool._waiting)))
        scope.submit(nothing)
        late.append(scope)
        gate.opened.set()
        concurrent.futures.wait([done], PATIENCE)
        assert waiting == [0]


def test_thousand_tasks_stay_under_the_caps() -> None:
    """A thousand tasks start no more threads than the cap, plus one for a wait."""
    cap, size = 4, 8
    idents: list[int] = []

    with make_scope(cap, ThreadPool(size)) as scope:
        for _ in range(1_000):
            scope.submit(lambda: idents.append(threading.get_ident()))

    assert len(idents) == 1_000
    assert len(set(idents)) <= size + 1
    assert threading.get_ident() not in idents


def test_open_scope_is_collected() -> None:
    """A scope that was never ended says so when it is collected; others don't."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope = make_scope(pool=ThreadPool(0))
        scope.submit(nothing)
        scope._pool._waiting.clear()
        del scope
        make_scope().end()
        make_scope().shutdown(wait=False)
        make: t.Any = TaskScope

        # Wrong arguments are an error of their own, with no second one on its heels.
        with pytest.raises(TypeError, match="max_workers"):
            make(ThreadPool(0))

        gc.collect()

    (warning,) = caught
    assert warning.category is ResourceWarning
    assert str(warning.message) == (
        "<TaskScope open queued=1 running=0 max_workers=2> was never ended."
        " Use 'with open_scope()'."
    )


def test_repr_counts() -> None:
    """A scope shows what waits, what runs, and whether it is open."""
    gate = Gate()
    scope = make_scope(1)
    scope.submit(gate)
    assert gate.begun.wait(PATIENCE)
    scope.submit(nothing)
    assert repr(scope) == "<TaskScope open queued=1 running=1 max_workers=1>"
    gate.opened.set()
    scope.end()
    assert repr(scope) == "<TaskScope closed queued=0 running=0 max_workers=1>"
