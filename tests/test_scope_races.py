from __future__ import annotations

import contextlib
import functools
import random
import typing as t

import pytest
from interleaving import explore
from interleaving import GapLock
from interleaving import HeldThreads
from interleaving import Schedule
from interleaving import ScheduledThreads
from reporting import Reporting

from flask_apitask import ScopeClosed
from flask_apitask import TaskScope

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import concurrent.futures

    from flask_apitask.threads import Threads

SEEDS = range(40)
STRESS_SEEDS = 100

# How many threads a pool has, and how often of three times it refuses.
Pool = t.Literal["full", "refusing", "failing", "sound"]
POOLS: dict[Pool, tuple[int, int]] = {
    "full": (0, 0),
    "refusing": (0, 3),
    "failing": (2, 1),
    "sound": (2, 0),
}


class _SilentScope(TaskScope):
    """A scope that need not be ended."""

    def __del__(self) -> None:
        pass


class Recorded:
    """A scope under a schedule, and what became of its tasks."""

    def __init__(
        self,
        schedule: Schedule,
        pool: Pool,
        max_workers: int,
        threads: Threads | None = None,
        **options: t.Any,
    ) -> None:
        self.schedule = schedule
        self.begun: list[str] = []
        self.done: list[str] = []
        self.most = 0
        self.futures: dict[str, concurrent.futures.Future[None]] = {}
        self.threads = threads or ScheduledThreads(schedule, *POOLS[pool])
        self.scope = _SilentScope(self.threads, max_workers=max_workers, **options)
        self.scope._lock = schedule.make_lock()

    def submit(self, name: str) -> None:
        self.futures[name] = self.scope.submit(self._work, name)

    def _work(self, name: str) -> None:
        self.begun.append(name)
        self.most = max(self.most, len(self.begun) - len(self.done))
        self.schedule.pause()
        self.done.append(name)


def fresh_seeds() -> cabc.Iterator[str]:
    source = random.SystemRandom()
    return (f"{source.getrandbits(64):x}" for _ in range(STRESS_SEEDS))


def barriers(schedule: Schedule, pool: Pool, max_workers: int) -> t.Any:
    """Two threads submit to one scope, and wait twice each."""
    recorded = Recorded(schedule, pool, max_workers)
    missing: list[str] = []

    def work(thread: str) -> None:
        for round_ in range(2):
            names = [f"{thread}{round_}{index}" for index in range(2)]

            for name in names:
                recorded.submit(name)

            known = list(recorded.futures)
            recorded.scope.wait()
            missing.extend(name for name in known if name not in recorded.done)

    schedule.spawn(functools.partial(work, "a"))
    schedule.spawn(functools.partial(work, "b"))

    def check() -> None:
        assert missing == []
        assert sorted(recorded.done) == sorted(recorded.futures)
        assert recorded.most <= max_workers

    return check


def wake_ups(schedule: Schedule, pool: Pool, max_workers: int) -> t.Any:
    """Two threads submit and go; one of them waits for its first tasks only."""
    recorded = Recorded(schedule, pool, max_workers)

    def waits() -> None:
        recorded.submit("a0")
        recorded.submit("a1")
        recorded.scope.wait()

    def goes() -> None:
        for index in range(3):
            recorded.submit(f"b{index}")

    schedule.spawn(waits)
    schedule.spawn(goes)

    def check() -> None:
        assert sorted(recorded.done) == ["a0", "a1", "b0", "b1", "b2"]
        assert recorded.most <= max_workers

        if max_workers == 1:
            assert [name for name in recorded.begun if name[0] == "b"] == [
                "b0",
                "b1",
                "b2",
            ]

    return check


def neighbours(schedule: Schedule, pool: Pool, max_workers: int) -> t.Any:
    """Two scopes share their threads, and nobody waits for one of them."""
    first = Recorded(schedule, pool, max_workers)
    second = Recorded(schedule, pool, max_workers, first.threads)

    def submits(recorded: Recorded) -> None:
        for index in range(3):
            recorded.submit(str(index))

    def waits(recorded: Recorded) -> None:
        submits(recorded)
        recorded.scope.wait()

    schedule.spawn(functools.partial(submits, first))
    schedule.spawn(functools.partial(waits, second))

    def check() -> None:
        for recorded in (first, second):
            assert sorted(recorded.done) == ["0", "1", "2"]
            assert recorded.most <= max_workers

            if max_workers == 1:
                assert recorded.begun == ["0", "1", "2"]

    return check


def late_submits(schedule: Schedule, pool: Pool, max_workers: int) -> t.Any:
    """One thread ends the scope while another still submits."""
    recorded = Recorded(schedule, pool, max_workers)
    done_at_end: list[str] = []

    def submits() -> None:
        with contextlib.suppress(ScopeClosed):
            for index in range(4):
                recorded.submit(str(index))

    def ends() -> None:
        recorded.scope.end()
        done_at_end.extend(recorded.done)

    schedule.spawn(submits)
    schedule.spawn(ends)

    def check() -> None:
        assert sorted(done_at_end) == sorted(recorded.futures)
        assert recorded.done == done_at_end
        assert recorded.most <= max_workers

    return check


def cancellations(schedule: Schedule, pool: Pool, max_workers: int) -> t.Any:
    """One thread cancels futures, another shuts down, and a third waits."""
    recorded = Recorded(schedule, pool, max_workers)
    undone_after_wait: list[str] = []

    def cancels() -> None:
        for index in range(3):
            recorded.submit(str(index))

        recorded.futures["2"].cancel()
        schedule.pause()
        recorded.futures["1"].cancel()
        recorded.scope.wait()
        undone_after_wait.extend(
            name for name, future in recorded.futures.items() if not future.done()
        )

    def shuts_down() -> None:
        schedule.pause(lambda: len(recorded.futures) == 3)
        recorded.scope.shutdown(cancel_futures=True)

    schedule.spawn(cancels)
    schedule.spawn(recorded.scope.wait)
    schedule.spawn(shuts_down)

    def check() -> None:
        assert undone_after_wait == []
        cancelled = [n for n, future in recorded.futures.items() if future.cancelled()]
        assert sorted(recorded.done + cancelled) == ["0", "1", "2"]
        assert recorded.most <= max_workers

    return check


def deadlines(schedule: Schedule, pool: Pool, max_workers: int) -> t.Any:
    """The scope ends at a deadline, which passes at any moment."""
    binding = Reporting()
    recorded = Recorded(schedule, pool, max_workers, timeout=1.0, binding=binding)
    begun_at_end: list[str] = []

    def ends() -> None:
        for index in range(4):
            recorded.submit(str(index))

        recorded.scope.end()
        begun_at_end.extend(recorded.begun)

    schedule.spawn(ends)

    def check() -> None:
        cancelled = [n for n, future in recorded.futures.items() if future.cancelled()]
        reported = [name for report in binding.reports for name in report.cancelled]
        assert len(reported) == len(cancelled)
        assert sorted(recorded.done + cancelled) == ["0", "1", "2", "3"]
        assert recorded.most <= max_workers
        # What begins after the end had been taken before, and was reported to run.
        assert len(recorded.begun) - len(begun_at_end) <= max_workers

    return check


PROGRAMS = [
    pytest.param(functools.partial(program, pool=pool, max_workers=cap), id=name)
    for program in (
        barriers,
        wake_ups,
        neighbours,
        late_submits,
        cancellations,
        deadlines,
    )
    for pool in POOLS
    for cap in (1, 2)
    # Where nobody waits, somebody has to come.
    if pool != "full" or program not in (wake_ups, neighbours)
    if (name := f"{program.__name__}-{pool}-{cap}")
]


def test_no_wake_up_is_lost() -> None:
    """A task that is submitted while the last one finishes is not left behind.

    It is submitted wherever the finishing thread has just given the lock back, and no
    thread comes but those that the scope then summons.
    """
    for gap in (1, 2):
        threads = HeldThreads()
        done: list[str] = []

        with TaskScope(threads, max_workers=1) as scope:
            scope.submit(done.append, "first")
            late = functools.partial(scope.submit, done.append, "late")
            scope._lock = GapLock(gap, late)  # type: ignore[assignment]

            while threads.calls:
                threads.come()

            assert done == ["first", "late"]


def test_no_late_submit_slips_through() -> None:
    """A task that is submitted during the end of its scope is refused, or done by then.

    It is submitted wherever the ending thread has just given the lock back.
    """
    for gap in range(1, 6):
        futures: list[concurrent.futures.Future[None]] = []
        done: list[str] = []
        scope = TaskScope(HeldThreads(), max_workers=1)

        def submit_late(
            scope: TaskScope = scope,
            done: list[str] = done,
            futures: list[concurrent.futures.Future[None]] = futures,
        ) -> None:
            with contextlib.suppress(ScopeClosed):
                futures.append(scope.submit(done.append, "late"))

        scope.submit(done.append, "first")
        scope._lock = GapLock(gap, submit_late)  # type: ignore[assignment]
        scope.end()
        assert done == ["first", "late"][: 1 + len(futures)]
        assert [future.done() for future in futures] == [True] * len(futures)


def test_thread_is_summoned_for_nothing() -> None:
    """A thread that comes while the helper works runs what is left, or nothing.

    It comes wherever the helping thread has just given the lock back.
    """
    for gap in range(1, 6):
        threads = HeldThreads()
        order: list[int] = []

        with TaskScope(threads, max_workers=1) as scope:
            for index in range(3):
                scope.submit(order.append, index)

            scope._lock = GapLock(gap, threads.come)  # type: ignore[assignment]
            scope.wait()
            assert order == [0, 1, 2]


@pytest.mark.parametrize("program", PROGRAMS)
def test_guarantees_hold_in_every_interleaving(program: t.Any) -> None:
    """Tasks run once, in order and under the cap, and every wait ends."""
    explore(program, SEEDS)


@pytest.mark.stress
@pytest.mark.parametrize("program", PROGRAMS)
def test_guarantees_hold_in_new_interleavings(program: t.Any) -> None:
    """The same in interleavings that no run before has tried."""
    explore(program, fresh_seeds())
