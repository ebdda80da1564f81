from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import threading
import types
import typing as t
from unittest import mock

from conftest import PATIENCE

from flask_apitask.executor import barrier as barrier_module
from flask_apitask.executor import pool as pool_module
from flask_apitask.executor import queue as queue_module
from flask_apitask.executor import worker as worker_module

if t.TYPE_CHECKING:
    import collections.abc as cabc

T = t.TypeVar("T")

# Those that look up the primitives of threading each time they need one.
_MODULES: t.Any = (
    *(barrier_module, queue_module, pool_module, worker_module),
    concurrent.futures._base,
)


class _Abandoned(BaseException):
    """Ends the threads of a schedule that is over."""


class _Actor:
    """A thread that runs when its schedule says so, and at no other time."""

    def __init__(self, name: str, of_pool: bool) -> None:
        self.name = name
        self.of_pool = of_pool
        self.turn = threading.Semaphore(0)
        self.ready: cabc.Callable[[], bool] = _always
        self.finished = False
        self.thread: threading.Thread


class Schedule:
    """Run real pools and scopes strictly one thread at a time, and switch at random.

    The locks, condition variables and threads that they make are the schedule's: it
    switches where a lock is taken or given back, where a thread is started, and where a
    test pauses. So a seed always gives the same interleaving. That nobody can go on,
    though a thread of the test has not returned, is a deadlock and fails the test.

    :param seed: Of the random choices.
    :param refusals: How often of three times the system gives no thread.
    :param interrupts: How often of three times a Ctrl-C hits the start of a thread,
        unless one of the pool starts it. It may come all the same, sooner or later.
    """

    def __init__(self, seed: object, refusals: int = 0, interrupts: int = 0) -> None:
        self._random = random.Random(str(seed))
        self._refusals = refusals
        self._interrupts = interrupts
        self._actors: list[_Actor] = []
        self._current: _Actor | None = None
        self._stopped = threading.Event()
        self._over = False
        self._error: BaseException | None = None

    def spawn(self, fn: cabc.Callable[[], object], *, of_pool: bool = False) -> None:
        """Add a thread.

        :param of_pool: It need not return.
        """
        actor = _Actor(f"thread {len(self._actors)}", of_pool)
        actor.thread = threading.Thread(target=self._act, args=(actor, fn), daemon=True)
        self._actors.append(actor)
        actor.thread.start()

    def pause(self, ready: cabc.Callable[[], bool] | None = None) -> None:
        """Let others run, and go on some time after a condition holds."""
        actor = self._current

        # What is collected later gives back locks as well.
        if actor is None or actor.thread is not threading.current_thread():
            return

        if not self._over:
            actor.ready = ready or _always
            self._switch()

            if self._current is not actor:
                assert actor.turn.acquire(timeout=3 * PATIENCE)

        if self._over:
            raise _Abandoned

    def run(self) -> None:
        """Run the threads until nobody can go on."""
        try:
            self._switch()
            assert self._stopped.wait(2 * PATIENCE), "a thread hangs"

            if self._error is not None:
                raise self._error

            stuck = [a.name for a in self._actors if not (a.finished or a.of_pool)]
            assert not stuck, f"deadlock: {stuck} never return"
        finally:
            self._over = True

            for actor in self._actors:
                self._current = actor
                actor.turn.release()
                actor.thread.join(PATIENCE)
                assert not actor.thread.is_alive()

    @contextlib.contextmanager
    def patched(self) -> cabc.Iterator[None]:
        """Make a block use the primitives of this schedule."""
        names = types.SimpleNamespace(**vars(threading))
        names.Lock = lambda: _Lock(self)
        names.Condition = lambda lock=None: _Condition(self, lock or _Lock(self))
        names.Thread = lambda target, args, **_: _Thread(self, target, args)

        with contextlib.ExitStack() as stack:
            for module in _MODULES:
                stack.enter_context(mock.patch.object(module, "threading", names))

            yield

    def choose(self, options: cabc.Sequence[T]) -> T:
        """Choose at random."""
        return self._random.choice(options)

    def on_pool_thread(self) -> bool:
        """Return whether the calling thread is one that a pool has started."""
        return self._current is not None and self._current.of_pool

    def count_pool_threads(self) -> int:
        """Return how many threads of pools there are."""
        return sum(actor.of_pool and not actor.finished for actor in self._actors)

    def start(self, target: t.Any, args: tuple[t.Any, ...]) -> None:
        """Start a thread of a pool, unless there is none to be had."""
        self.pause()

        if self.choose(range(3)) < self._refusals:
            raise RuntimeError("can't start new thread")

        interrupted = (
            not self.on_pool_thread() and self.choose(range(3)) < self._interrupts
        )

        if not interrupted or self.choose([True, False]):
            self.spawn(lambda: target(*args), of_pool=True)
            self.pause()

        if interrupted:
            raise KeyboardInterrupt

    def _switch(self) -> None:
        """Choose who goes on. The caller does not, unless it is chosen."""
        ready = [a for a in self._actors if not a.finished and a.ready()]

        if not ready or self._error is not None:
            self._current = None
            self._stopped.set()
            return

        before, self._current = self._current, self.choose(ready)

        if self._current is not before:
            self._current.turn.release()

    def _act(self, actor: _Actor, fn: cabc.Callable[[], object]) -> None:
        actor.turn.acquire()

        try:
            if not self._over:
                fn()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = self._error or error
        finally:
            actor.finished = True

            if not self._over:
                self._switch()


class _Lock:
    """A lock that is taken when the schedule says so; a timeout may pass any time."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        waits = blocking and timeout < 0
        self._schedule.pause(self._is_free if waits else None)
        taken = not self._held
        self._held = True
        return taken

    def release(self) -> None:
        assert self._held, "a lock is released twice"
        self._held = False
        self._schedule.pause()

    def _is_free(self) -> bool:
        return not self._held

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class _Condition:
    """A condition variable of a schedule."""

    def __init__(self, schedule: Schedule, lock: _Lock) -> None:
        self._schedule = schedule
        self._lock = lock
        self._notified = 0

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        notified = self._notified
        self._lock.release()
        self._schedule.pause(lambda: self._notified != notified or timeout is not None)
        self._lock.acquire()
        return self._notified != notified

    def wait_for(self, predicate: cabc.Callable[[], bool]) -> None:
        while not predicate():
            self.wait()

    def notify_all(self) -> None:
        self._notified += 1


class _Thread:
    """A thread of a pool, that its schedule starts."""

    def __init__(
        self, schedule: Schedule, target: t.Any, args: tuple[t.Any, ...]
    ) -> None:
        self.start = lambda: schedule.start(target, args)


class GapLock:
    """A lock that calls a function once, right after it was released a given time.

    :param gap: After which release, counted from 1.
    :param thread: Whose releases count, ``None`` for everybody's.
    """

    def __init__(
        self, gap: int, call: cabc.Callable[[], object], thread: str | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._gap = gap
        self._call = call
        self._thread = thread
        self._released = 0

    def __enter__(self) -> None:
        assert self._lock.acquire(timeout=PATIENCE)

    def __exit__(self, *error: object) -> None:
        self._lock.release()

        if self._thread in (None, threading.current_thread().name):
            self._released += 1

            if self._released == self._gap:
                self._call()


def explore(
    program: cabc.Callable[[Schedule], cabc.Callable[[], None]],
    seeds: cabc.Iterable[object],
    **chances: int,
) -> None:
    """Run threads in many interleavings, and name the seed of one that fails.

    :param program: Adds the threads to a schedule, and returns what checks the outcome.
    :param chances: Of the schedule.
    """
    with _on_one_processor():
        for seed in seeds:
            schedule = Schedule(seed, **chances)

            try:
                with schedule.patched():
                    check = program(schedule)
                    schedule.run()
                    check()
            except BaseException as error:
                raise AssertionError(f"With the seed {seed!r}: {error}") from error


@contextlib.contextmanager
def _on_one_processor() -> cabc.Iterator[None]:
    """Start threads that run in turns on one processor: to change it takes longer."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return

    allowed = os.sched_getaffinity(0)
    # One for each process of pytest-xdist.
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(allowed)[number % len(allowed)]})

    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _always() -> bool:
    return True
