from __future__ import annotations

import contextlib
import threading
import types
import typing as t

import pytest
from conftest import PATIENCE
from interleaving import explore
from interleaving import Schedule

from flask_apitask import locks
from flask_apitask.locks import BargingLock

if t.TYPE_CHECKING:
    import collections.abc as cabc


class Interrupted(BaseException):
    """What a signal handler raises."""


class Sleeps:
    """Know of the threads that sleep on a lock, and interfere with them.

    ``on_sleeping`` is called in a thread that is about to sleep, and ``on_waking`` in
    one that was woken.
    """

    def __init__(self) -> None:
        self.on_sleeping: cabc.Callable[[], object] = bool
        self.on_waking: cabc.Callable[[], object] = bool
        self._begun = threading.Semaphore(0)
        sleeps = self

        class Lock:
            def __init__(self) -> None:
                self._lock = threading.Lock()
                self.release = self._lock.release

            def acquire(self, blocking: bool = True) -> bool:
                if self._lock.acquire(False):
                    return True

                if not blocking:
                    return False

                sleeps._begun.release()
                sleeps.on_sleeping()
                assert self._lock.acquire(timeout=PATIENCE)
                sleeps.on_waking()
                return True

        self.Lock = Lock

    def await_one(self) -> None:
        """Return when one more thread can be woken, and has not got the lock."""
        assert self._begun.acquire(timeout=PATIENCE)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    """Sleep on locks that the test knows of."""
    sleeps = Sleeps()
    monkeypatch.setattr(locks, "threading", types.SimpleNamespace(Lock=sleeps.Lock))
    return sleeps


class Visitor(threading.Thread):
    """A thread that takes a lock once, and gives it back."""

    def __init__(self, lock: BargingLock, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._lock = lock
        self._entered = False
        self.start()

    def run(self) -> None:
        with contextlib.suppress(Interrupted), self._lock:
            self._entered = True

    def has_entered(self) -> bool:
        """Wait for its end, and return whether it got the lock."""
        self.join(PATIENCE / 2)
        assert not self.is_alive()
        return self._entered


class SwitchToken(list[None]):
    """The token of a lock, at which threads are switched."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__([None])
        self._pause = schedule.pause

    def pop(self, index: t.SupportsIndex = -1) -> None:
        self._pause()

        try:
            super().pop(index)
        finally:
            self._pause()

    def append(self, item: None) -> None:
        self._pause()
        super().append(item)
        self._pause()


def test_one_at_a_time_and_none_for_ever() -> None:
    """In no interleaving are two threads in at once, or does one sleep for ever."""

    def program(schedule: Schedule) -> cabc.Callable[[], None]:
        lock = BargingLock()
        lock._token = SwitchToken(schedule)
        inside: list[int] = []
        entered: list[int] = []

        def visit() -> None:
            for _ in range(3):
                with lock:
                    inside.append(1)
                    schedule.pause()
                    assert len(inside) == 1
                    entered.append(inside.pop())

        for _ in range(4):
            schedule.spawn(visit)

        def check() -> None:
            assert len(entered) == 12

        return check

    explore(program, range(200))


def test_is_not_handed_to_a_thread_that_does_not_run(sleeps: Sleeps) -> None:
    """Who runs can take it again before the one that was woken tries to."""
    woken, runs = threading.Event(), threading.Event()

    def delay() -> None:
        woken.set()
        assert runs.wait(PATIENCE)

    sleeps.on_waking = delay
    lock = BargingLock()

    with lock:
        visitor = Visitor(lock, "visitor")
        sleeps.await_one()

    assert woken.wait(PATIENCE)

    with lock:
        runs.set()
        # It has tried in vain, and sleeps again.
        sleeps.await_one()

    assert visitor.has_entered()


@pytest.mark.parametrize("moment", ["on_sleeping", "on_waking"])
def test_interrupted_thread_keeps_no_wake_up(sleeps: Sleeps, moment: str) -> None:
    """Others get the lock that a thread slept on when it was interrupted."""
    interrupted, go_on = threading.Event(), threading.Event()
    lock = BargingLock()

    def interrupt() -> None:
        if threading.current_thread().name == "first":
            interrupted.set()
            assert go_on.wait(PATIENCE)
            raise Interrupted

    setattr(sleeps, moment, interrupt)

    with lock:
        earlier = Visitor(lock, "earlier")
        sleeps.await_one()
        first = Visitor(lock, "first")
        sleeps.await_one()

        if moment == "on_sleeping":
            assert interrupted.wait(PATIENCE)
            go_on.set()
            assert not first.has_entered()
            # The earlier one was woken instead, in vain, and sleeps again.
            sleeps.await_one()

        second = Visitor(lock, "second")
        sleeps.await_one()

    go_on.set()
    assert not first.has_entered()
    assert earlier.has_entered()
    assert second.has_entered()
