from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import threading
import time
import typing as t
import weakref

import pytest
from conftest import PATIENCE
from conftest import wait_until
from interleaving import GapLock
from late_threads import in_time
from scopes import Gate
from scopes import join
from scopes import make_scope
from scopes import no_collector
from scopes import Payload
from scopes import start

from flask_apitask.executor import pool as pool_module
from flask_apitask.executor.overdue import OverdueTask
from flask_apitask.executor.pool import ThreadPool

if t.TYPE_CHECKING:
    import collections.abc as cabc

real_start = threading.Thread.start


class Calling:
    """What a pool takes for a scope: it calls a function, and notes the threads."""

    waiters = 0

    def __init__(self, fn: cabc.Callable[[], object] = bool) -> None:
        self._fn = fn
        self.threads: list[threading.Thread] = []
        self.served = threading.Semaphore(0)

    def serve(self, how: str) -> None:
        assert how == "thread"
        self.threads.append(threading.current_thread())
        self._fn()
        self.served.release()

    def wait(self) -> threading.Thread:
        """Wait until a thread has served it, and return that."""
        assert self.served.acquire(timeout=PATIENCE)
        return self.threads[-1]


def request(pool: ThreadPool, fn: cabc.Callable[[], object] = bool) -> Calling:
    """Have a pool call a function."""
    calling: t.Any = Calling(fn)
    assert pool.request(calling)
    return t.cast("Calling", calling)


def abandon(pool: ThreadPool, scope: Calling, grace: float = 0.0) -> int:
    """Have the threads that have served a scope replaced, if they still do."""
    overdue = [
        OverdueTask("stuck", "", thread.ident or 0, grace) for thread in scope.threads
    ]
    abandoned = pool.abandon(t.cast("t.Any", scope), overdue)
    pool.replace_abandoned()
    return abandoned


def close(pool: ThreadPool) -> None:
    """Close a pool as an exit that begins now does."""
    pool.close(time.monotonic())


def expect(pool: ThreadPool, **counts: int) -> None:
    """Wait until a pool is in a state; what is not named is none."""
    names = ("busy", "idle", "abandoned", "waiting")
    state = "".join(f" {name}={counts.get(name, 0)}" for name in names)
    wait_until(lambda: repr(pool) == f"<ThreadPool size={pool._size}{state}>")


def fill(pool: ThreadPool, count: int = 1) -> tuple[list[Calling], Gate]:
    """Keep threads of a pool busy until a gate is opened."""
    gate = Gate()
    busy = [request(pool, gate) for _ in range(count)]
    wait_until(lambda: len(gate.threads) == count)
    return busy, gate


def test_threads_are_started_on_demand() -> None:
    """No more threads are started than are needed, and the size is the most."""
    before = threading.active_count()
    pool = ThreadPool(2)
    assert threading.active_count() == before
    busy, gate = fill(pool)
    assert threading.active_count() == before + 1
    more, second_gate = fill(pool)
    queued = [request(pool) for _ in range(3)]
    expect(pool, busy=2, waiting=3)
    assert threading.active_count() == before + 2
    gate.opened.set()
    second_gate.opened.set()
    names = {scope.wait().name for scope in [*busy, *more, *queued]}
    assert names == {"apitask_0", "apitask_1"}
    assert busy[0].threads[0].daemon
    expect(pool, idle=2)


def test_idle_thread_is_used_again() -> None:
    """A thread that has nothing to do serves the next scope."""
    pool = ThreadPool(2)
    used = []

    for _ in range(20):
        used.append(request(pool).wait())
        expect(pool, idle=1)

    assert len(set(used)) == 1


def test_scopes_are_served_in_order() -> None:
    """The scope that has queued longest is served first."""
    pool = ThreadPool(1)
    order: list[int] = []
    _, gate = fill(pool)
    queued = [request(pool, functools.partial(order.append, i)) for i in range(5)]
    gate.opened.set()
    queued[-1].wait()
    assert order == [0, 1, 2, 3, 4]


def test_threads_end_with_their_last_reference() -> None:
    """Idle threads end as soon as nobody can use them any more."""
    pool = ThreadPool(1)
    thread = request(pool).wait()
    gone = threading.Event()
    weakref.finalize(pool, gone.set)
    del pool
    assert gone.wait(PATIENCE)
    join(thread)


def test_thread_keeps_nothing_of_whoever_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It starts in an empty context, and keeps neither a scope nor a variable.

    Also where Python lets threads inherit the context, as it may from 3.14 on, or where
    a library that replaces the start does that.
    """
    variable: contextvars.ContextVar[Payload] = contextvars.ContextVar("variable")
    pool = ThreadPool(1)
    found: list[object] = []

    def replaced(thread: threading.Thread) -> None:
        found.append(variable.get(t.cast("t.Any", None)))
        real_start(thread)

    monkeypatch.setattr(threading.Thread, "start", replaced)

    def ask() -> weakref.ref[Payload]:
        payload = Payload()
        variable.set(payload)
        scope = request(pool, lambda: found.append(variable.get(t.cast("t.Any", None))))
        scope.wait()
        weakref.finalize(scope, gone.set)
        return weakref.ref(payload)

    with no_collector():
        gone = threading.Event()
        reference = contextvars.Context().run(ask)
        assert found == [None, None]
        assert reference() is None
        assert gone.wait(PATIENCE)


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_no_request_is_lost_while_a_thread_goes_to_rest(gap: int) -> None:
    """A scope that comes wherever a thread has just given the lock back is served."""
    pool = ThreadPool(1)
    late: list[Calling] = []
    lock: t.Any = GapLock(gap, lambda: late.append(request(pool)), "apitask_0")
    pool._lock = lock

    for _ in range(3):
        request(pool).wait()

    wait_until(lambda: bool(late))
    late[0].wait()
    expect(pool, idle=1)


@pytest.mark.parametrize("comes", [False, True])
def test_start_is_interrupted(monkeypatch: pytest.MonkeyPatch, comes: bool) -> None:
    """A thread whose start a Ctrl-C hits serves nobody, whether it comes or not."""
    pool = ThreadPool(1)
    started: list[threading.Thread] = []

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.undo()

        if comes:
            real_start(thread)
            started.append(thread)

        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    scope = Calling()

    with pytest.raises(KeyboardInterrupt):
        pool.request(t.cast("t.Any", scope))

    join(*started)
    assert not scope.threads
    expect(pool)
    assert request(pool).wait() not in started
    in_time(close, pool)


def test_interrupted_submit_leaves_others_their_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A waiting thread does not rely on a thread that never comes."""
    waiting: list[threading.Thread] = []
    scope = make_scope()

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.undo()
        waiting.append(start(scope.wait))
        wait_until(lambda: scope.waiters == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)

    with pytest.raises(KeyboardInterrupt):
        scope.submit(bool)

    join(*waiting)
    scope.end()


def test_refusal_is_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal, the next request for a thread succeeds again."""
    pool = ThreadPool(1)

    def refuse(thread: threading.Thread) -> t.NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not pool.request(t.cast("t.Any", Calling()))
    expect(pool)
    monkeypatch.undo()
    request(pool).wait()


def test_any_error_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that can't be started for want of memory is not asked for again."""

    def refuse(thread: threading.Thread) -> t.NoReturn:
        raise MemoryError

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pool = ThreadPool(1)

    with make_scope(1, pool) as scope:
        future = scope.submit(threading.get_ident)
        assert future.result(0) == threading.get_ident()

    assert pool._refusal == "MemoryError()"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_scope_that_queued_behind_a_thread_that_never_came(
    error: type[BaseException],
) -> None:
    """Another thread is asked to come in its place."""
    pool = ThreadPool(1)
    queued: list[Calling] = []

    def fail_once(worker: object) -> t.NoReturn:
        del pool._start
        queued.append(request(pool))
        raise error("can't start new thread")

    pool._start = fail_once  # type: ignore[method-assign]

    with contextlib.suppress(KeyboardInterrupt):
        assert not pool.request(t.cast("t.Any", Calling()))

    queued[0].wait()
    expect(pool, idle=1)


def test_each_cause_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """A log says once why tasks run inline, and again only for another reason."""
    pool = ThreadPool(1)

    for cause in ("first", "first", "second"):
        pool._refusal = cause
        pool.warn()

    assert [record.args for record in caplog.records] == [("first",), ("second",)]


def test_abandoned_threads_are_replaced() -> None:
    """Others serve in the place of those that are stuck, and queued scopes at once."""
    pool = ThreadPool(2)
    stuck, trap = fill(pool, 2)
    queued = [request(pool) for _ in range(2)]
    assert abandon(pool, stuck[0]) == 1
    assert queued[0].wait() not in stuck[0].threads + stuck[1].threads
    queued[1].wait()
    assert abandon(pool, stuck[1]) == 2
    expect(pool, busy=2, idle=1, abandoned=2)
    busy, gate = fill(pool, 2)
    expect(pool, busy=4, abandoned=2)
    # Now there are two too many, and those that come last leave.
    trap.opened.set()
    join(*stuck[0].threads, *stuck[1].threads)
    expect(pool, busy=2)
    gate.opened.set()
    expect(pool, idle=2)
    assert {scope.threads[0].is_alive() for scope in busy} == {True}


def test_no_more_than_the_size_are_replaced() -> None:
    """With twice as many threads stuck as may serve, scopes queue until one is free."""
    pool = ThreadPool(1)
    stuck, trap = fill(pool)
    assert abandon(pool, stuck[0]) == 1
    more, second_trap = fill(pool)
    assert abandon(pool, more[0]) == 2
    queued = request(pool)
    expect(pool, busy=2, abandoned=2, waiting=1)
    # A thread that comes back before it was replaced goes on.
    second_trap.opened.set()
    assert queued.wait() is more[0].threads[0]
    trap.opened.set()
    expect(pool, idle=1)


def test_thread_that_is_done_is_not_abandoned() -> None:
    """Neither one that sleeps nor one that serves another scope counts as stuck."""
    pool = ThreadPool(1)
    scope = request(pool)
    scope.wait()
    expect(pool, idle=1)
    assert abandon(pool, scope) == 0
    _, gate = fill(pool)
    assert abandon(pool, scope) == 0
    gate.opened.set()
    expect(pool, idle=1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_abandoned_thread_can_not_be_replaced(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """A queued scope stays in the queue if no thread can be started just then."""
    pool = ThreadPool(1)
    stuck, trap = fill(pool)
    queued = request(pool)

    def refuse(thread: threading.Thread) -> t.NoReturn:
        raise error

    monkeypatch.setattr(threading.Thread, "start", refuse)

    if error is KeyboardInterrupt:
        with pytest.raises(error):
            abandon(pool, stuck[0])
    else:
        assert abandon(pool, stuck[0]) == 1

    expect(pool, busy=1, abandoned=1, waiting=1)
    monkeypatch.undo()
    trap.opened.set()
    assert queued.wait() is stuck[0].threads[0]


def test_close_waits_for_busy_threads() -> None:
    """It waits for those that serve and for what queues, and ends those that sleep."""
    pool = ThreadPool(2)
    sleeping = request(pool)
    sleeping.wait()
    expect(pool, idle=1)
    busy, gate = fill(pool, 2)
    queued = request(pool)
    ending = start(close, pool)
    wait_until(lambda: pool._closed)
    # Nobody would wait for a thread that starts now.
    assert not pool.request(t.cast("t.Any", Calling()))
    assert ending.is_alive()
    gate.opened.set()
    join(ending)
    assert queued.served.acquire(blocking=False)
    join(*(thread for scope in busy for thread in scope.threads))

    pool = ThreadPool(1)
    idle = request(pool).wait()
    expect(pool, idle=1)
    in_time(close, pool)
    join(idle)


@pytest.mark.parametrize("before", [True, False])
def test_close_leaves_abandoned_threads_behind(before: bool) -> None:
    """It does not wait for a task that was given up, or is meanwhile."""
    pool = ThreadPool(1)
    stuck, trap = fill(pool)
    ending = None if before else start(close, pool)
    wait_until(lambda: before or pool._closed)
    abandon(pool, stuck[0])
    join(ending or start(close, pool))
    trap.opened.set()
    join(*stuck[0].threads)


@pytest.mark.parametrize("before", [True, False])
def test_close_waits_for_an_abandoned_task_in_its_grace(
    before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that finishes in time is not left behind, and not logged."""
    pool = ThreadPool(3)
    short, short_trap = fill(pool)
    stuck, trap = fill(pool)
    endless, endless_trap = fill(pool)
    abandon(pool, short[0], PATIENCE)
    abandon(pool, endless[0], 0.0)

    if before:
        abandon(pool, stuck[0], math.inf)

    ending = start(close, pool)
    wait_until(lambda: pool._closed)

    if not before:
        abandon(pool, stuck[0], math.inf)

    short_trap.opened.set()
    join(*short[0].threads)
    assert ending.is_alive()
    assert caplog.messages == []
    trap.opened.set()
    join(ending, *stuck[0].threads)
    assert caplog.messages == [
        "The process exits without waiting any longer for 1 task(s) past their"
        " deadline: 'stuck'"
    ]
    endless_trap.opened.set()


def test_grace_begins_with_the_exit(caplog: pytest.LogCaptureFixture) -> None:
    """It is over at the same time for all pools, whichever is closed first."""
    pool = ThreadPool(1)
    stuck, trap = fill(pool)
    abandon(pool, stuck[0], PATIENCE)
    in_time(pool.close, time.monotonic() - PATIENCE)
    assert len(caplog.messages) == 1
    trap.opened.set()


@pytest.mark.parametrize("refused", [True, False])
def test_close_waits_for_a_thread_that_is_being_started(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """The exit waits for a thread that is just about to start, if it does."""
    pool, gate = ThreadPool(1), Gate()
    ending: list[threading.Thread] = []

    def start_late(thread: threading.Thread) -> None:
        monkeypatch.undo()
        ending.append(start(close, pool))
        wait_until(lambda: pool._closed)

        if refused:
            raise RuntimeError("can't start new thread")

        real_start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    scope: t.Any = Calling(gate)
    assert pool.request(scope) is not refused

    if not refused:
        assert gate.begun.wait(PATIENCE)
        assert ending[0].is_alive()
        gate.opened.set()

    join(*ending)


def test_server_that_lets_no_thread_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a thread would freeze between requests, none is started."""
    monkeypatch.setattr(pool_module, "threads_enabled", lambda: False)
    pool = ThreadPool(1)
    assert not pool.request(t.cast("t.Any", Calling()))
    assert "enable-threads = true" in pool._refusal
    expect(pool)
