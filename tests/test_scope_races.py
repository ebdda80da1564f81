from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import random
import typing as t

import pytest
from interleaving import explore
from interleaving import Schedule
from reporting import Reporting

from flask_apitask import ScopeClosed
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.scope import TaskScope

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.executor.runner import Runner

SEEDS = range(30)
STRESS_SEEDS = 100

# The size of a pool, and how often of three times a start is refused or interrupted.
POOLS: dict[str, tuple[int, int, int]] = {
    "full": (0, 0, 0),
    "one": (1, 0, 0),
    "two": (2, 0, 0),
    "refusing": (1, 3, 0),
    "failing": (2, 1, 0),
    "interrupted": (1, 0, 1),
}
SOUND = ("one", "two", "failing")


class Recorded:
    """A scope under a schedule, and what became of its tasks."""

    def __init__(
        self,
        schedule: Schedule,
        pool: ThreadPool,
        cap: int,
        timeout: float | None = None,
        runner: Runner | None = None,
    ) -> None:
        self.schedule = schedule
        self.pool = pool
        self.cap = cap
        self.scope = TaskScope(pool, cap, timeout, runner)
        # Not told of if it is never ended.
        self.scope.__class__ = _SilentScope
        self.begun: list[str] = []
        self.done: list[str] = []
        self.inline: list[str] = []
        self.most = 0
        self.futures: dict[str, concurrent.futures.Future[None]] = {}

    def submit(self, name: str, work: cabc.Callable[[], object] | None = None) -> None:
        """Submit a task; a Ctrl-C may leave open whether it was."""
        with contextlib.suppress(KeyboardInterrupt):
            self.futures[name] = self.scope.submit(self._work, name, work)

    def wait(self) -> None:
        """Wait once more after each Ctrl-C."""
        persist(self.scope.wait)

    def _work(self, name: str, work: cabc.Callable[[], object] | None) -> None:
        self.begun.append(name)
        self.most = max(self.most, len(self.begun) - len(self.done))

        if not self.schedule.on_pool_thread():
            self.inline.append(name)

        self.schedule.pause()

        if work is not None:
            work()

        self.done.append(name)

    def check(self) -> None:
        """Check what holds whatever the tasks do, once they are done."""
        cancelled = {n for n, future in self.futures.items() if future.cancelled()}
        assert len(self.done) == len(set(self.done)), "a task ran twice"
        assert set(self.futures) - cancelled <= set(self.done), "a task is lost"
        assert not cancelled & set(self.done)
        assert self.most <= self.cap
        # Else one that is lacking later is taken for one that has been requested.
        queued = self.pool._waiting.count(self.scope)
        assert 0 <= self.scope._requested <= queued
        assert self.scope.waiters == 0


class _SilentScope(TaskScope):
    def __del__(self) -> None:
        pass


def persist(wait: cabc.Callable[[], object]) -> None:
    """Do it until no Ctrl-C interrupts it."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            wait()
            return


def two_threads_wait(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """Two threads submit to one scope and wait for it, twice each."""
    recorded = Recorded(schedule, pool, cap)
    missing: list[str] = []

    def work(thread: str) -> None:
        for round_ in range(2):
            for index in range(2):
                recorded.submit(f"{thread}{round_}{index}")

            known = list(recorded.futures)
            recorded.wait()
            missing.extend(name for name in known if name not in recorded.done)

    schedule.spawn(functools.partial(work, "a"))
    schedule.spawn(functools.partial(work, "b"))

    def check() -> None:
        assert missing == []
        recorded.check()

    return check, [recorded]


def results(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """One thread waits for each of its tasks by itself, another for its last one."""
    recorded = Recorded(schedule, pool, cap)

    def one_by_one() -> None:
        for index in range(3):
            recorded.submit(f"a{index}")

            if f"a{index}" in recorded.futures:
                persist(recorded.futures[f"a{index}"].result)

    def the_last() -> None:
        for index in range(3):
            recorded.submit(f"b{index}")

        for name in ("b2", "b0"):
            if name in recorded.futures:
                persist(recorded.futures[name].exception)

    schedule.spawn(one_by_one)
    schedule.spawn(the_last)
    # What was submitted by an interrupted call has nobody who waits for it.
    schedule.spawn(recorded.wait)
    return recorded.check, [recorded]


def nested(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """Tasks have scopes of their own, and wait for them, down to some depth."""
    scopes = [Recorded(schedule, pool, cap)]

    def nest(depth: int) -> None:
        inner = Recorded(schedule, pool, cap)
        scopes.append(inner)

        for index in range(2):
            work = functools.partial(nest, depth - 1) if depth and index else None
            inner.submit(str(index), work)

        persist(inner.scope.end)

    def outer() -> None:
        for index in range(2):
            scopes[0].submit(str(index), functools.partial(nest, 1))

        persist(scopes[0].scope.end)

    schedule.spawn(outer)

    def check() -> None:
        for recorded in scopes:
            recorded.check()

    return check, scopes


def neighbours(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """Two scopes share their threads, and nobody waits for one of them."""
    first = Recorded(schedule, pool, cap)
    second = Recorded(schedule, pool, cap)

    def submits(recorded: Recorded) -> None:
        for index in range(3):
            recorded.submit(str(index))

    def waits() -> None:
        submits(second)
        second.wait()

    schedule.spawn(functools.partial(submits, first))
    schedule.spawn(waits)

    def check() -> None:
        for recorded in (first, second):
            recorded.check()

            if cap == 1:
                assert recorded.begun == sorted(recorded.begun)

    return check, [first, second]


def late_submits(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """One thread ends the scope while another still submits."""
    recorded = Recorded(schedule, pool, cap)
    done_at_end: list[str] = []

    def submits() -> None:
        with contextlib.suppress(ScopeClosed):
            for index in range(4):
                recorded.submit(str(index))

    def ends() -> None:
        persist(recorded.scope.end)
        done_at_end.extend(recorded.done)

    schedule.spawn(submits)
    schedule.spawn(ends)

    def check() -> None:
        recorded.check()
        assert recorded.done == done_at_end
        assert not pool._waiting, "a scope that has ended is kept"

    return check, [recorded]


def cancellations(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """One thread cancels futures, another shuts down, and two wait."""
    recorded = Recorded(schedule, pool, cap)
    undone: list[str] = []

    def cancels() -> None:
        with contextlib.suppress(ScopeClosed):
            for index in range(3):
                recorded.submit(str(index))

        for future in [*recorded.futures.values()][:0:-1]:
            future.cancel()
            schedule.pause()

        recorded.wait()
        undone.extend(n for n, future in recorded.futures.items() if not future.done())

    def shuts_down() -> None:
        shutdown = functools.partial(recorded.scope.shutdown, cancel_futures=True)
        # Not for a future: an interrupted call returns none.
        schedule.pause(lambda: bool(recorded.scope._submitted))
        persist(shutdown)

    schedule.spawn(cancels)
    schedule.spawn(recorded.wait)
    schedule.spawn(shuts_down)

    def check() -> None:
        assert undone == []
        recorded.check()

    return check, [recorded]


def deadlines(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """A scope ends at a deadline, which passes at any moment; another one waits."""
    runner = Reporting()
    recorded = Recorded(schedule, pool, cap, 1.0, runner)
    other = Recorded(schedule, pool, cap)
    begun_at_end: list[str] = []

    def ends() -> None:
        for index in range(3):
            recorded.submit(str(index))

        persist(recorded.scope.end)
        begun_at_end.extend(recorded.begun)

    def waits() -> None:
        other.submit("0")
        other.submit("1")
        other.wait()

    schedule.spawn(ends)
    schedule.spawn(waits)

    def check() -> None:
        recorded.check()
        other.check()
        cancelled = [n for n, future in recorded.futures.items() if future.cancelled()]
        reported = [name for report in runner.reports for name in report.cancelled]
        assert len(reported) >= len(cancelled)
        # What begins after the end had been taken before, and was reported to run.
        assert len(recorded.begun) - len(begun_at_end) <= cap
        assert not pool._abandoned

    return check, [recorded, other]


def impatience(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """Waits end too early, and the last of them does not."""
    recorded = Recorded(schedule, pool, cap)

    def polls() -> None:
        for index in range(2):
            recorded.submit(str(index))

            with contextlib.suppress(*IMPATIENCE):
                recorded.scope.wait(0.0)

        for future in recorded.futures.values():
            with contextlib.suppress(*IMPATIENCE):
                future.result(0.0)

        recorded.wait()
        assert set(recorded.futures) <= set(recorded.done)

    schedule.spawn(polls)
    return recorded.check, [recorded]


def exit_of_the_process(schedule: Schedule, pool: ThreadPool, cap: int) -> t.Any:
    """The pool closes while one thread submits and goes, and another waits."""
    recorded = Recorded(schedule, pool, cap)
    waited = Recorded(schedule, pool, cap)

    def submits() -> None:
        for index in range(3):
            recorded.submit(str(index))

    def waits() -> None:
        waited.submit("0")
        waited.submit("1")
        waited.wait()

    schedule.spawn(submits)
    schedule.spawn(waits)
    schedule.spawn(lambda: persist(lambda: pool.close(0.0)))

    def check() -> None:
        recorded.check()
        waited.check()
        assert schedule.count_pool_threads() == 0, "a thread sleeps for ever"

    return check, []


PROGRAMS = [
    pytest.param(program, pool, cap, id=f"{program.__name__}-{pool}-{cap}")
    for program in (
        two_threads_wait,
        results,
        nested,
        neighbours,
        late_submits,
        cancellations,
        deadlines,
        impatience,
        exit_of_the_process,
    )
    for pool in POOLS
    for cap in (1, 2)
    # Where nobody waits, a thread of the pool has to come.
    if program not in (neighbours, exit_of_the_process) or pool in SOUND
]


# Before Python 3.11, a future's is not the built-in one.
IMPATIENCE = (TimeoutError, concurrent.futures.TimeoutError, KeyboardInterrupt)


def run_program(
    program: t.Any, pool: str, cap: int, seeds: cabc.Iterable[object]
) -> None:
    """Explore a program with a pool of a kind."""
    size, refusals, interrupts = POOLS[pool]

    def set_up(schedule: Schedule) -> cabc.Callable[[], None]:
        threads = ThreadPool(size)
        check, scopes = program(schedule, threads, cap)

        def check_all() -> None:
            check()

            # Those that system gives no thread for, and no others, run inline.
            if not refusals:
                assert [name for scope in scopes for name in scope.inline] == []

            assert not threads._busy

        return check_all

    explore(set_up, seeds, refusals=refusals, interrupts=interrupts)


@pytest.mark.parametrize(("program", "pool", "cap"), PROGRAMS)
def test_guarantees_hold_in_every_interleaving(
    program: t.Any, pool: str, cap: int
) -> None:
    """Tasks run once, in order, under the cap, on threads of the pool; waits end."""
    run_program(program, pool, cap, SEEDS)


@pytest.mark.stress
@pytest.mark.parametrize(("program", "pool", "cap"), PROGRAMS)
def test_guarantees_hold_in_new_interleavings(
    program: t.Any, pool: str, cap: int
) -> None:
    """The same in interleavings that no run before has tried."""
    source = random.SystemRandom()
    seeds = (f"{source.getrandbits(64):x}" for _ in range(STRESS_SEEDS))
    run_program(program, pool, cap, seeds)
