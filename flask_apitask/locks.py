from __future__ import annotations

import contextlib
import threading


class BargingLock:
    """A lock that is never handed to a thread that sleeps.

    :class:`threading.Lock` belongs to one that sleeps on it as soon as it is released.
    That one still has to wait for the interpreter, and then holds up whoever has the
    interpreter and needs the lock again: two threads with small tasks change places at
    each of them (a *lock convoy*). Here, who is woken has to try again when it runs.

    Not for long waits: a thread may be overtaken any number of times.

    What could break it, and what prevents it:

    1.  *Lost wake-up.* The lock is released between the failed try of a thread and its
        sleep. So the thread can be woken before it tries, and who releases looks after
        that for one to wake.
    2.  *A wake-up for nobody.* The thread that it is meant for has the lock by then, or
        was interrupted by a signal handler that raises. The first looks for one to wake
        when it releases; the second wakes one at once.

    Assumption, as for :class:`threading.Condition`: no signal handler raises in the
    instants between the lock being taken and the block that it guards, and between the
    lock being released and one being woken.
    """

    __slots__ = ("_sleepers", "_token")

    def __init__(self) -> None:
        # Its one item is had by who has the lock. To take it is cheaper than a try of
        # a threading.Lock.
        self._token: list[None] = [None]
        # What each sleeps on, first come first. A list's methods are atomic.
        self._sleepers: list[threading.Lock] = []

    def __enter__(self) -> None:
        try:
            self._token.pop()
        except IndexError:
            self._sleep_and_try()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._token.append(None)

        if self._sleepers:
            self._wake()

    def _sleep_and_try(self) -> None:
        asleep = threading.Lock()
        asleep.acquire()

        try:
            while True:
                self._sleepers.append(asleep)

                if self._try():
                    self._forget(asleep)
                    return

                asleep.acquire()
        except BaseException:
            self._forget(asleep)
            self._wake()
            raise

    def _try(self) -> bool:
        try:
            self._token.pop()
        except IndexError:
            return False

        return True

    def _forget(self, asleep: threading.Lock) -> None:
        # It is not there any more if it was woken.
        with contextlib.suppress(ValueError):
            self._sleepers.remove(asleep)

    def _wake(self) -> None:
        # Another thread may have come first and left none.
        with contextlib.suppress(IndexError):
            self._sleepers.pop(0).release()
