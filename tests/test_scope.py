from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import math
import subprocess
import sys
import threading
import typing as t
import warnings
import weakref

import pytest
from conftest import PATIENCE
from interleaving import GapLock
from interleaving import HeldThreads
from interleaving import RefusingThreads
from interleaving import run_in_thread
from reporting import Reporting

from flask_apitask import ScopeClosed
from flask_apitask import TaskScope
from flask_apitask.jobs import Job
from flask_apitask.jobs import Unbound
from flask_apitask.threads import Threads
from flask_apitask.threads import Worker

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.threads import How

T = t.TypeVar("T")

CONTAINED = [
    ValueError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
]


class Payload:
    """An argument or a result that a weak reference can point to."""


class Greeting:
    """A task with a name."""

    name = "greeting"

    def run(self) -> str:
        return "hello"


class Gate:
    """A task that is under way until it is let through."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.opened.wait(PATIENCE)
        return "through"


class LastThreads(HeldThreads):
    """A pool that refuses from some moment on."""

    refusing = False

    def rouse(self, worker: Worker) -> None:
        if self.refusing:
            raise RuntimeError("can't start new thread")

        super().rouse(worker)


def make_scope(
    max_workers: int = 2, threads: Threads | None = None, **options: t.Any
) -> TaskScope:
    return TaskScope(threads or Threads(4), max_workers=max_workers, **options)


def fail(error: BaseException) -> t.NoReturn:
    raise error


def nothing() -> None:
    pass


@contextlib.contextmanager
def no_collector() -> cabc.Iterator[None]:
    """Leave it to reference counts alone to free what a block used."""
    gc.collect()
    gc.disable()

    try:
        yield
    finally:
        gc.enable()


def test_submit_returns_the_future() -> None:
    """A task's result is in the future that its submission returned."""
    with make_scope() as scope:
        assert scope.submit(divmod, 7, 2).result(PATIENCE) == (3, 1)


def test_every_argument_belongs_to_the_task() -> None:
    """No keyword is taken by the scope, whatever its name is."""

    def collect(*args: object, **kwargs: object) -> t.Any:
        return args, kwargs

    with make_scope() as scope:
        keywords: dict[str, t.Any] = {"self": 1, "fn": 2, "timeout": 3, "task": 4}
        future = scope.submit(collect, "fn", **keywords)
        assert future.result(PATIENCE) == (("fn",), keywords)


def test_submit_takes_task_objects() -> None:
    """An object with a name and a ``run`` method is a task too."""
    with make_scope() as scope:
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
        "Task 'test_scope.nothing' was submitted to a scope that has ended. Submit"
        " before the end of the request or of the 'with' block, or use run(), which"
        " then calls the task on the spot."
    )
    assert scope.closed


def test_scope_ends_while_it_is_given_a_task() -> None:
    """A submission that comes too late is refused, and its name is read unlocked.

    The name is the user's code, which may use the scope itself.
    """
    lock = GapLock(0, nothing)

    class Nosy:
        @property
        def name(self) -> str:
            assert not lock.locked()
            scope.end()
            return "nosy"

        def run(self) -> None: ...

    scope = make_scope()
    scope._lock = lock  # type: ignore[assignment]
    nosy: t.Any = Nosy()

    with pytest.raises(ScopeClosed, match=r"^Task 'nosy' was"):
        scope.submit(nosy)

    assert repr(scope) == "<TaskScope closed queued=0 running=0 max_workers=2>"


def test_threads_run_in_order() -> None:
    """With one worker the threads of a pool run one task at a time, in order."""
    order: list[int] = []

    with make_scope(max_workers=1) as scope:
        futures = [scope.submit(order.append, index) for index in range(50)]
        concurrent.futures.wait(futures, PATIENCE)
        assert order == list(range(50))


def test_helper_runs_in_order() -> None:
    """With one worker the thread that waits runs one task at a time, in order."""
    order: list[int] = []

    with make_scope(max_workers=1, threads=HeldThreads()) as scope:
        for index in range(50):
            scope.submit(order.append, index)

        scope.wait()
        assert order == list(range(50))


def test_second_waiting_thread_runs_in_order() -> None:
    """With one worker a second thread that waits goes on where the first left."""
    order: list[str] = []

    with make_scope(max_workers=1, threads=HeldThreads()) as scope:

        def first() -> None:
            order.append("first begins")
            run_in_thread(functools.partial(scope.submit, order.append, "second"))
            order.append("first ends")

        scope.submit(first)
        run_in_thread(scope.wait)
        assert order == ["first begins", "first ends"]
        run_in_thread(scope.wait)
        assert order == ["first begins", "first ends", "second"]


def test_cap_counts_the_helping_thread() -> None:
    """No thread of the pool takes a task while the helper is at the cap."""
    threads = HeldThreads()
    order: list[str] = []

    def first() -> None:
        # The scope has summoned one thread. It comes, finds the cap reached, and goes.
        threads.come()
        order.append("first")

    with make_scope(max_workers=1, threads=threads) as scope:
        scope.submit(first)
        scope.submit(order.append, "second")
        scope.wait()
        assert order == ["first", "second"]


def test_tasks_run_side_by_side_up_to_the_cap() -> None:
    """As many tasks as the cap allows run at once, and never more."""
    cap = 3
    meeting = threading.Barrier(cap)
    lock = threading.Lock()
    running = 0
    most = 0

    def meet() -> None:
        nonlocal running, most

        with lock:
            running += 1
            most = max(most, running)

        meeting.wait(PATIENCE)

        with lock:
            running -= 1

        meeting.wait(PATIENCE)

    with make_scope(max_workers=cap, threads=Threads(8)) as scope:
        futures = [scope.submit(meet) for _ in range(cap * 4)]
        scope.wait()
        assert [future.exception(0) for future in futures] == [None] * cap * 4

    assert most == cap


def test_helper_needs_no_thread() -> None:
    """A full pool delays nobody: the thread that waits runs the tasks itself."""
    idents: list[int] = []

    with make_scope(threads=HeldThreads()) as scope:
        for _ in range(3):
            scope.submit(lambda: idents.append(threading.get_ident()))

        scope.wait()

    assert idents == [threading.get_ident()] * 3


def test_second_helper_needs_no_thread() -> None:
    """A thread that sleeps at the cap goes on helping once a helper has left.

    The first thread waits for the first task only. When it leaves, the second task is
    for the second thread, as the pool never sends one.
    """
    threads = HeldThreads()
    gate = Gate()
    done: list[str] = []

    with make_scope(max_workers=1, threads=threads) as scope:
        scope.submit(gate)
        first = threading.Thread(target=scope.wait, daemon=True)
        first.start()
        assert gate.begun.wait(PATIENCE)
        scope.submit(done.append, "second")
        # The lock is given back for the first time by the wait, before it sleeps.
        asleep = threading.Event()
        scope._lock = GapLock(1, asleep.set, "second")  # type: ignore[assignment]
        second = threading.Thread(target=scope.wait, name="second", daemon=True)
        second.start()
        assert asleep.wait(PATIENCE)
        gate.opened.set()
        first.join(PATIENCE)
        second.join(PATIENCE / 10)
        helped = not second.is_alive()

        while threads.calls:
            threads.come()

        second.join(PATIENCE)
        assert helped, "the second thread waits for a thread of the pool"


def test_wait_is_a_barrier() -> None:
    """Tasks that are submitted during a wait don't prolong it, and still run."""
    threads = HeldThreads()
    done: list[str] = []

    with make_scope(max_workers=1, threads=threads) as scope:

        def first() -> None:
            # The thread that was summoned for this task finds the cap reached.
            threads.come()
            scope.submit(done.append, "later")
            done.append("first")

        future = scope.submit(first)
        scope.wait()
        assert future.done()
        assert done == ["first"]
        # The helper has left with work in the queue, so it summoned a thread.
        threads.come()
        assert done == ["first", "later"]


def test_scope_is_usable_after_a_wait() -> None:
    """A wait ends nothing: tasks may be submitted and waited for after it."""
    done: list[int] = []

    with make_scope() as scope:
        for index in range(3):
            scope.submit(done.append, index)
            scope.wait()
            assert done == list(range(index + 1))

        scope.wait()


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
def test_wait_times_out(timeout: float) -> None:
    """A wait that is too short says how much is left, and the tasks go on."""
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


def test_wait_with_a_timeout_does_not_help() -> None:
    """A thread that must leave in time runs no task, as it could not stop it."""
    threads = HeldThreads()
    done: list[str] = []

    with make_scope(threads=threads) as scope:
        scope.submit(done.append, "task")

        with pytest.raises(TimeoutError, match=r"^1 of the scope's tasks"):
            scope.wait(0.001)

        assert done == []
        threads.come()
        assert done == ["task"]
        scope.wait(0)


def test_wait_for_ever() -> None:
    """Infinity is a timeout like none at all."""
    gate = Gate()

    with make_scope() as scope:
        scope.submit(gate)
        assert gate.begun.wait(PATIENCE)
        timer = threading.Timer(0.01, gate.opened.set)
        timer.start()
        scope.wait(math.inf)
        timer.join(PATIENCE)


def test_two_threads_wait() -> None:
    """Every thread that waits is let go when the tasks are done."""
    gate = Gate()

    with make_scope() as scope:
        scope.submit(gate)
        waiting = [threading.Thread(target=scope.wait, daemon=True) for _ in range(3)]

        for thread in waiting:
            thread.start()

        gate.opened.set()

        for thread in waiting:
            thread.join(PATIENCE)
            assert not thread.is_alive()

        # The scope keeps no record of waits that are over.
        assert scope._waiters == []


def test_empty_wait() -> None:
    """With nothing to wait for, a wait and an end return at once."""
    scope = make_scope(threads=RefusingThreads())
    scope.wait()
    scope.wait(0)
    scope.end()
    scope.end()


def test_no_thread_to_be_had() -> None:
    """Where the pool refuses, the submitting thread runs the tasks, in order."""
    idents: list[int] = []

    with make_scope(max_workers=1, threads=RefusingThreads()) as scope:
        for index in range(3):
            future = scope.submit(lambda: idents.append(threading.get_ident()))
            assert future.done()
            assert len(idents) == index + 1

    assert idents == [threading.get_ident()] * 3


@pytest.mark.parametrize(
    ("max_workers", "expected"),
    [(1, ["outer", "end of outer", "inner"]), (2, ["outer", "inner", "end of outer"])],
)
def test_inline_tasks_keep_to_the_cap(max_workers: int, expected: list[str]) -> None:
    """A task that submits another where no thread can be had stays under the cap."""
    order: list[str] = []

    with make_scope(max_workers, RefusingThreads()) as scope:

        def outer() -> None:
            order.append("outer")
            scope.submit(order.append, "inner")
            order.append("end of outer")

        scope.submit(outer)
        assert order == expected


def test_refusal_is_no_context_of_an_error() -> None:
    """What a task raises inline does not seem to come from the pool's refusal."""
    with make_scope(threads=RefusingThreads()) as scope:
        error = scope.submit(fail, ValueError("its own")).exception(0)
        assert isinstance(error, ValueError)
        assert error.__context__ is None


def test_no_second_thread_to_be_had() -> None:
    """A thread that can have no other beside it runs all of the queue by itself."""

    threads = LastThreads()
    order: list[str] = []

    with make_scope(threads=threads) as scope:
        for name in ("first", "second", "third"):
            scope.submit(order.append, name)

        threads.refusing = True
        threads.come()
        assert order == ["first", "second", "third"]


def test_helper_leaves_and_no_thread_is_to_be_had() -> None:
    """A helper that leaves work behind runs it where nobody else would."""
    order: list[str] = []

    threads = LastThreads()

    def first() -> None:
        threads.come()
        threads.refusing = True
        scope.submit(order.append, "later")
        order.append("first")

    with make_scope(max_workers=1, threads=threads) as scope:
        scope.submit(first)
        scope.wait()
        assert order == ["first", "later"]


def test_refused_after_a_thread_took_it() -> None:
    """A thread that comes though its start has failed does no harm."""

    class Overtaken(HeldThreads):
        def rouse(self, worker: Worker) -> None:
            super().rouse(worker)
            raise RuntimeError("can't start new thread")

    threads = Overtaken()
    order: list[int] = []

    with make_scope(max_workers=1, threads=threads) as scope:
        for index in range(5):
            scope.submit(order.append, index)

        for _ in range(5):
            threads.come()

        for index in range(5, 10):
            scope.submit(order.append, index)

        assert order == list(range(10))


def test_jobs_know_where_they_run() -> None:
    """A job is told whether a thread, a helper or its submitter runs it."""
    hows: list[How] = []

    class Noting(Unbound):
        def call(self, job: Job[T], how: How) -> T:
            hows.append(how)
            return super().call(job, how)

    with make_scope(binding=Noting()) as scope:
        scope.submit(nothing).result(PATIENCE)

    with make_scope(threads=HeldThreads(), binding=Noting()) as scope:
        scope.submit(nothing)

    with make_scope(threads=RefusingThreads(), binding=Noting()) as scope:
        scope.submit(nothing)

    assert hows == ["thread", "helped", "inline"]


@pytest.mark.parametrize("threads", [Threads, HeldThreads])
@pytest.mark.parametrize("error_type", CONTAINED)
def test_exceptions_are_contained(
    error_type: type[BaseException], threads: type[Threads]
) -> None:
    """An exception of any class ends its task and nothing else."""
    pool = Threads(1) if threads is Threads else HeldThreads()
    error = error_type("contained")

    with make_scope(max_workers=1, threads=pool) as scope:
        failing = scope.submit(fail, error)
        following = scope.submit(len, "abc")
        scope.wait()
        assert failing.exception(0) is error
        assert following.result(0) == 3


@pytest.mark.parametrize("how", ["thread", "helped", "cancelled"])
@pytest.mark.parametrize("error_type", CONTAINED)
def test_callback_that_raises(
    error_type: type[BaseException], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A future's callback that raises is logged, and holds up nobody.

    The standard library lets through what is no ``Exception``.
    """
    threads = HeldThreads()
    called: list[concurrent.futures.Future[None]] = []

    with make_scope(max_workers=1, threads=threads) as scope:
        future = scope.submit(nothing)
        future.add_done_callback(lambda _: fail(error_type("callback")))
        future.add_done_callback(called.append)
        following = scope.submit(len, "abc")

        if how == "thread":
            threads.come()
        elif how == "cancelled":
            future.cancel()

        scope.wait()
        assert following.result(0) == 3

    assert called == [future]
    assert [record.name for record in caplog.records] == ["flask_apitask.futures"]
    assert caplog.records[0].exc_info
    assert isinstance(caplog.records[0].exc_info[1], error_type)


def test_cancelled_future_is_skipped() -> None:
    """A future that is cancelled in time never runs, and nobody waits for it."""
    done: list[str] = []
    callbacks: list[concurrent.futures.Future[None]] = []

    with make_scope(max_workers=1, threads=HeldThreads()) as scope:
        futures = [scope.submit(done.append, name) for name in "abc"]
        futures[1].add_done_callback(callbacks.append)
        assert futures[1].cancel()
        scope.wait()
        assert done == ["a", "c"]
        assert callbacks == [futures[1]]
        assert concurrent.futures.wait(futures, 0).not_done == set()
        assert not futures[0].cancel()


def test_shutdown_cancels_what_is_queued() -> None:
    """With ``cancel_futures`` the running task ends, and the others never begin."""
    gate = Gate()

    with make_scope(max_workers=1, timeout=0.0) as scope:
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
        assert running.result(0) == "through"


def test_shutdown_waits() -> None:
    """A shutdown refuses tasks, runs those submitted, and may be done again."""
    done: list[int] = []
    scope = make_scope(threads=HeldThreads())

    for index in range(3):
        scope.submit(done.append, index)

    scope.shutdown(wait=False)
    assert done == []
    scope.shutdown()
    scope.shutdown()
    assert done == [0, 1, 2]


def test_block_waits_when_it_raises() -> None:
    """The tasks of a ``with`` block are done when it is left by an exception too."""
    done: list[int] = []

    def block() -> None:
        with make_scope(threads=HeldThreads()) as scope:
            scope.submit(done.append, 1)
            raise LookupError("block")

    with pytest.raises(LookupError, match="block"):
        block()

    assert done == [1]


def test_waiting_for_futures() -> None:
    """The functions of ``concurrent.futures`` work as with any executor."""
    with make_scope() as scope:
        futures = [scope.submit(pow, 2, index) for index in range(10)]
        finished = concurrent.futures.as_completed(futures, PATIENCE)
        assert sorted(future.result() for future in finished) == [
            2**index for index in range(10)
        ]
        assert concurrent.futures.wait(futures, PATIENCE).not_done == set()
        assert list(scope.map(pow, [2, 3], [3, 2], timeout=PATIENCE)) == [8, 9]


def test_event_loop_runs_in_the_scope() -> None:
    """``run_in_executor`` takes a scope, and cancels what is not begun."""

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

    with make_scope(max_workers=1) as scope:
        assert asyncio.run(main(scope)) == 3


def test_end_at_the_deadline() -> None:
    """At the deadline an end cancels what is queued, and reports what it leaves."""
    gate = Gate()
    binding = Reporting()
    scope = make_scope(max_workers=1, timeout=0.001, binding=binding)
    running = scope.submit(gate)
    assert gate.begun.wait(PATIENCE)
    queued: list[concurrent.futures.Future[t.Any]] = [
        scope.submit(nothing),
        scope.submit(len, "abc"),
        scope.submit(nothing),
    ]
    queued[2].cancel()

    scope.end()

    (overdue,) = binding.reports
    assert overdue.timeout == 0.001
    # What the user cancelled is no news to them.
    assert overdue.cancelled == ["test_scope.nothing", "builtins.len"]
    ((name, stack),) = overdue.running
    assert name == "test_scope.Gate"
    assert "in __call__" in stack
    assert "self.opened.wait(PATIENCE)" in stack
    assert [future.cancelled() for future in queued] == [True] * 3
    assert scope.closed
    gate.opened.set()
    assert running.result(PATIENCE) == "through"


def test_deadline_leaves_the_next_scope_alone() -> None:
    """A task that is stuck in one scope neither slows down nor fails another one."""
    gate = Gate()
    threads = Threads(2)
    binding = Reporting()
    stuck = make_scope(timeout=0.0, threads=threads, binding=binding)
    future = stuck.submit(gate)
    assert gate.begun.wait(PATIENCE)
    stuck.end()
    assert len(binding.reports) == 1

    for _ in range(3):
        scope = make_scope(threads=threads, timeout=PATIENCE)
        result = scope.submit(len, "abc")
        scope.end()
        assert result.result(0) == 3

    gate.opened.set()
    assert future.result(PATIENCE) == "through"


def test_end_with_time_to_spare() -> None:
    """An end before the deadline has nothing to report."""
    scope = make_scope(timeout=PATIENCE)
    future = scope.submit(len, "abc")
    scope.end()
    assert future.done()


def test_task_is_done_between_the_deadline_and_the_report() -> None:
    """What finishes before it could be reported is not overdue."""
    gate = Gate()
    scope = make_scope(timeout=0.0)
    scope.submit(gate)
    assert gate.begun.wait(PATIENCE)

    def finish() -> None:
        gate.opened.set()
        scope.wait(PATIENCE)

    # Released to close, to begin to wait, to give up, and after what is queued.
    scope._lock = GapLock(4, finish, "MainThread")  # type: ignore[assignment]
    scope.end()


def test_task_is_done_while_it_is_reported() -> None:
    """What finishes between the look at the tasks and at the stacks is not overdue."""
    gate = Gate()
    scope = make_scope(timeout=0.0)
    scope.submit(gate)
    assert gate.begun.wait(PATIENCE)

    def finish() -> None:
        gate.opened.set()
        scope.wait(PATIENCE)

    # As above, and then to look at what runs.
    scope._lock = GapLock(5, finish, "MainThread")  # type: ignore[assignment]
    scope.end()


def test_stack_of_a_task_that_is_just_beginning() -> None:
    """A task that a thread has taken and not begun is reported with its stack."""
    threads = HeldThreads()
    taken = threading.Event()
    ended = threading.Event()
    binding = Reporting()
    scope = make_scope(timeout=0.0, threads=threads, binding=binding)
    future = scope.submit(nothing)

    def pause() -> None:
        taken.set()
        assert ended.wait(PATIENCE)

    scope._lock = GapLock(1, pause, "worker")  # type: ignore[assignment]
    worker = threading.Thread(target=threads.calls.pop(), name="worker", daemon=True)
    worker.start()
    assert taken.wait(PATIENCE)
    scope.end()
    ended.set()
    worker.join(PATIENCE)
    (overdue,) = binding.reports
    assert [name for name, _ in overdue.running] == ["test_scope.nothing"]
    assert "in serve" in overdue.running[0][1]
    assert future.done()


def test_stack_of_a_task_on_no_thread_of_the_system() -> None:
    """A task that a greenlet runs is reported without a stack."""
    job: Job[None] = Job(nothing, (), {})
    assert job.describe({}) == (
        "test_scope.nothing",
        "  (no stack: it runs on no thread of the system)\n",
    )


@pytest.mark.parametrize("how", ["thread", "helped", "inline", "cancelled"])
def test_wait_leaves_no_reference_to_a_task(how: str) -> None:
    """After a wait no argument and no result is alive on the scope's account."""
    threads: dict[str, Threads] = {
        "thread": Threads(2),
        "inline": RefusingThreads(),
    }
    gate = threading.Event()

    def give_back(payload: Payload, *, extra: Payload) -> Payload:
        assert gate.wait(PATIENCE)
        return Payload()

    with (
        no_collector(),
        make_scope(1, threads.get(how) or HeldThreads()) as scope,
    ):
        if how != "thread":
            gate.set()

        for _ in range(20):
            argument, extra = Payload(), Payload()
            references = [weakref.ref(argument), weakref.ref(extra)]
            future = scope.submit(give_back, argument, extra=extra)
            del argument, extra

            if how == "cancelled":
                assert future.cancel()
            elif how == "thread":
                assert [reference() is not None for reference in references] == [
                    True,
                    True,
                ]
                gate.set()

            scope.wait(PATIENCE if how == "thread" else None)
            assert [reference() for reference in references] == [None, None]

            if how != "cancelled":
                result = weakref.ref(future.result(0))
                del future
                assert result() is None


@pytest.mark.parametrize("threads", [Threads, HeldThreads, RefusingThreads])
def test_wait_leaves_no_reference_to_an_exception(threads: type[Threads]) -> None:
    """After a wait an exception goes with its future, and with it all of its frames."""
    pool = Threads(1) if threads is Threads else threads()  # type: ignore[call-arg]

    class Failure(Exception):
        pass

    def raise_failure(payload: Payload) -> t.NoReturn:
        raise Failure

    with no_collector(), make_scope(1, pool) as scope:
        for _ in range(20):
            payload = Payload()
            future = scope.submit(raise_failure, payload)
            payload_ref = weakref.ref(payload)
            del payload
            scope.wait(PATIENCE if threads is Threads else None)
            error_ref = weakref.ref(t.cast("Failure", future.exception(0)))
            del future
            assert error_ref() is None
            assert payload_ref() is None


@pytest.mark.parametrize("outcome", ["result", "exception", "cancelled"])
def test_thread_on_its_way_home_holds_no_task(outcome: str) -> None:
    """A wait may be over before the thread has left: it refers to nothing by then."""
    threads = HeldThreads()
    home = threading.Event()

    def work(payload: Payload) -> Payload:
        if outcome == "exception":
            raise LookupError

        return payload

    with no_collector(), make_scope(threads=threads) as scope:
        payload = Payload()
        reference = weakref.ref(payload)
        future = scope.submit(work, payload)

        if outcome == "cancelled":
            future.cancel()

        del payload, future
        # The thread gives the lock back to begin, and to give its slot back.
        pause = functools.partial(home.wait, PATIENCE)
        scope._lock = GapLock(2, pause, "worker")  # type: ignore[assignment]
        call = threads.calls.pop()
        worker = threading.Thread(target=call, name="worker", daemon=True)
        worker.start()
        scope.wait(PATIENCE)
        assert worker.is_alive()
        assert reference() is None
        home.set()
        worker.join(PATIENCE)


def test_report_of_a_deadline_keeps_no_frame() -> None:
    """The snapshot of stacks does not keep alive what was on them."""
    gate = Gate()
    references: list[weakref.ref[Payload]] = []
    gone = threading.Event()

    def stuck(payload: Payload) -> None:
        gate()

    def caller(scope: TaskScope) -> None:
        local = Payload()
        references.append(weakref.ref(local))

        with pytest.warns(UserWarning, match="left tasks behind"):
            scope.end()

    with no_collector():
        scope = make_scope(timeout=0.0)
        payload = Payload()
        weakref.finalize(payload, gone.set)
        scope.submit(stuck, payload)
        del payload
        assert gate.begun.wait(PATIENCE)
        caller(scope)
        assert references[0]() is None, "a local variable of the caller is kept alive"
        gate.opened.set()
        scope.wait(PATIENCE)
        assert gone.is_set(), "an argument of the task that was stuck is kept alive"


def test_scope_is_in_no_cycle() -> None:
    """A scope goes with its last reference, and its threads go with it."""
    with no_collector():
        gone = threading.Event()
        threads_gone = threading.Event()
        threads = Threads(2)
        weakref.finalize(threads, threads_gone.set)
        scope = make_scope(threads=threads)
        weakref.finalize(scope, gone.set)

        for _ in range(20):
            scope.submit(nothing)

        scope.end()
        del scope, threads
        # A thread that has just run the last task may still be on its way home.
        assert gone.wait(PATIENCE)
        assert threads_gone.wait(PATIENCE)


def test_thousand_tasks_stay_under_the_caps() -> None:
    """A thousand tasks start no more threads than the cap, and all are done."""
    cap, size = 4, 8
    idents: set[int] = set()
    counter = itertools.count()
    names: set[str] = set()

    def count() -> None:
        idents.add(threading.get_ident())
        names.update(thread.name for thread in threading.enumerate())
        next(counter)

    with make_scope(cap, Threads(size)) as scope:
        for _ in range(1_000):
            scope.submit(count)

    assert next(counter) == 1_000
    assert len(idents - {threading.get_ident()}) <= size
    assert len([name for name in names if name.startswith("apitask")]) <= size


def test_no_task_starts_no_thread() -> None:
    """A scope without a task starts no thread."""
    before = threading.active_count()

    with make_scope() as scope:
        scope.wait()
        assert threading.active_count() == before


def test_open_scope_is_collected() -> None:
    """A scope that was never ended says so when it is collected, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope = make_scope(threads=HeldThreads())
        scope.submit(nothing)
        scope._threads = RefusingThreads()
        del scope
        gc.collect()

    (warning,) = caught
    assert warning.category is ResourceWarning
    assert str(warning.message) == (
        "<TaskScope open queued=1 running=0 max_workers=2> was never ended."
        " Use 'with open_scope()'."
    )


def test_ended_scope_is_collected_in_silence() -> None:
    """A scope that was ended goes without a word."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_scope().end()
        make_scope().shutdown(wait=False)
        gc.collect()

    assert caught == []


def test_scope_without_a_cap() -> None:
    """Wrong arguments are an error of their own, with no second one on its heels."""
    make: t.Any = TaskScope

    with pytest.raises(TypeError, match="max_workers"):
        make(HeldThreads())

    gc.collect()


def test_repr_counts() -> None:
    """A scope shows what waits, what runs, and whether it is open."""
    gate = Gate()
    scope = make_scope(max_workers=1)
    assert repr(scope) == "<TaskScope open queued=0 running=0 max_workers=1>"
    scope.submit(gate)
    assert gate.begun.wait(PATIENCE)
    scope.submit(nothing)
    assert repr(scope) == "<TaskScope open queued=1 running=1 max_workers=1>"
    gate.opened.set()
    scope.end()
    assert repr(scope) == "<TaskScope closed queued=0 running=0 max_workers=1>"


def test_scope_knows_no_flask() -> None:
    """The core of the threads works without a Flask app, and without Flask."""
    code = (
        "import importlib.util, sys\n"
        "sys.modules['flask'] = None\n"
        "spec = importlib.util.find_spec('flask_apitask')\n"
        "package = importlib.util.module_from_spec(spec)\n"
        "sys.modules['flask_apitask'] = package\n"
        "from flask_apitask.scope import TaskScope\n"
        "from flask_apitask.threads import Threads\n"
        "with TaskScope(Threads(1), max_workers=1) as scope:\n"
        "    print(scope.submit(len, 'abc').result(10))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE * 3,
    )
    assert (done.stdout, done.stderr) == ("3\n", "")
