from __future__ import annotations

import functools
import random
import threading
import types
import typing as t
from collections import deque
from unittest import mock

from conftest import PATIENCE

from flask_apitask import locks as locks_module
from flask_apitask import scope as scope_module
from flask_apitask.threads import Threads

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.threads import Worker

T = t.TypeVar("T")


class HeldThreads(Threads):
    """A pool whose threads are all busy, until a test lets one come."""

    def __init__(self) -> None:
        super().__init__(100)
        self.calls: list[cabc.Callable[[], object]] = []

    def rouse(self, worker: Worker) -> None:
        self.calls.append(functools.partial(self.work, worker))

    def come(self) -> None:
        """Let one thread come, and wait until it has gone home."""
        run_in_thread(self.calls.pop(0))


class RefusingThreads(Threads):
    """A pool of a system that starts no more threads."""

    def __init__(self) -> None:
        super().__init__(1)

    def rouse(self, worker: Worker) -> None:
        raise RuntimeError("can't start new thread")


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

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        assert self._lock.acquire(timeout=PATIENCE)

    def __exit__(self, *error: object) -> None:
        self._lock.release()

        if self._thread in (None, threading.current_thread().name):
            self._released += 1

            if self._released == self._gap:
                self._call()


def run_in_thread(fn: cabc.Callable[[], object]) -> None:
    """Call a function in a thread of its own, and wait for its end."""
    thread = threading.Thread(target=fn, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"{fn} does not return"


class _Abandoned(BaseException):
    """Ends the threads of a schedule that is over."""


class _Actor:
    """A thread that runs when its schedule says so, and at no other time."""

    def __init__(self, name: str, idle: bool) -> None:
        self.name = name
        self.idle = idle
        self.turn = threading.Semaphore(0)
        self.ready: cabc.Callable[[], bool] = _always
        self.finished = False


class Schedule:
    """Run threads strictly one at a time, and switch between them at random.

    They may be switched where they take a lock of the scope, where they pause,
    and nowhere else; so a seed always gives the same interleaving. That nobody can go
    on any more, though a thread has not returned, is a deadlock and fails the test.

    :param seed: Of the random choices.
    """

    def __init__(self, seed: object) -> None:
        self._random = random.Random(str(seed))
        self._actors: dict[int, _Actor] = {}
        self._all: list[_Actor] = []
        self._threads: list[threading.Thread] = []
        self._back = threading.Semaphore(0)
        self._over = False
        self._error: BaseException | None = None

    def spawn(self, fn: cabc.Callable[[], object], *, idle: bool = False) -> None:
        """Add a thread.

        :param idle: It need not return.
        """
        actor = _Actor(f"thread {len(self._all)}", idle)
        thread = threading.Thread(target=self._act, args=(actor, fn), daemon=True)
        self._all.append(actor)
        self._threads.append(thread)
        thread.start()

    def pause(self, ready: cabc.Callable[[], bool] | None = None) -> None:
        """Let others run, and go on some time after a condition holds."""
        actor = self._actors[threading.get_ident()]
        actor.ready = ready or _always

        if not self._over:
            self._back.release()
            actor.turn.acquire()

        if self._over:
            raise _Abandoned

    def run(self) -> None:
        """Run the threads until nobody can go on."""
        namespace = types.SimpleNamespace(**vars(threading))
        namespace.Lock = functools.partial(_SwitchLock, self)

        try:
            with (
                mock.patch.object(scope_module, "threading", namespace),
                mock.patch.object(locks_module, "threading", namespace),
            ):
                while ready := [a for a in self._all if not a.finished and a.ready()]:
                    self.choose(ready).turn.release()
                    assert self._back.acquire(timeout=PATIENCE), "a thread hangs"

                    if self._error is not None:
                        raise self._error

            stuck = [a.name for a in self._all if not (a.finished or a.idle)]
            assert not stuck, f"deadlock: {stuck} never return"
        finally:
            self._abandon()

    def choose(self, options: cabc.Sequence[T]) -> T:
        """Choose at random."""
        return self._random.choice(options)

    def make_lock(self) -> t.Any:
        """Make a lock where the threads may be switched."""
        return _SwitchLock(self)

    def _act(self, actor: _Actor, fn: cabc.Callable[[], object]) -> None:
        self._actors[threading.get_ident()] = actor
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
            self._back.release()

    def _abandon(self) -> None:
        self._over = True

        for actor, thread in zip(self._all, self._threads, strict=True):
            while thread.is_alive():
                actor.turn.release()
                thread.join(0.01)


class _SwitchLock:
    """A lock that is taken when the schedule says so; a timeout may pass any time."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking and timeout < 0:
            self._schedule.pause(lambda: not self._held)
        else:
            self._schedule.pause()

        taken = not self._held
        self._held = True
        return taken

    def release(self) -> None:
        assert self._held, "a lock is released twice"
        self._held = False

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class _SwitchDeque(deque[t.Any]):
    """Scopes that wait for a thread, at which threads are switched."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._pause = schedule.pause

    def append(self, scope: t.Any) -> None:
        self._pause()
        super().append(scope)
        self._pause()

    def popleft(self) -> t.Any:
        self._pause()
        return super().popleft()

    def remove(self, scope: t.Any) -> None:
        self._pause()
        super().remove(scope)


class ScheduledThreads(Threads):
    """A pool of the threads of a schedule.

    :param size: Most threads. With none of them, nobody ever comes.
    :param refusals: How often of three times a thread is refused. One that is refused
        may come all the same, as one does whose start was interrupted.
    """

    def __init__(self, schedule: Schedule, size: int, refusals: int) -> None:
        super().__init__(max(1, size))
        self._schedule = schedule
        self._refusals = refusals
        self._lock = schedule.make_lock()
        self._waiting = _SwitchDeque(schedule)
        self._calls: list[cabc.Callable[[], object]] = []

        for _ in range(size):
            schedule.spawn(self._work, idle=True)

    def rouse(self, worker: Worker) -> None:
        self._schedule.pause()
        refused = self._schedule.choose(range(3)) < self._refusals

        if not refused or self._schedule.choose([False, True]):
            self._calls.append(functools.partial(self.work, worker))

        if refused:
            raise RuntimeError("can't start new thread")

    def _work(self) -> None:
        while True:
            self._schedule.pause(lambda: bool(self._calls))
            self._calls.pop(0)()


def explore(
    set_up: cabc.Callable[[Schedule], cabc.Callable[[], None]],
    seeds: cabc.Iterable[object],
) -> None:
    """Run threads in many interleavings, and name the seed of one that fails.

    :param set_up: Adds the threads to a schedule, and returns what checks the outcome.
    """
    for seed in seeds:
        schedule = Schedule(seed)
        check = set_up(schedule)

        try:
            schedule.run()
            check()
        except BaseException as error:
            raise AssertionError(f"With the seed {seed!r}: {error}") from error


def _always() -> bool:
    return True
