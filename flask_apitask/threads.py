from __future__ import annotations

import atexit
import itertools
import os
import threading
import typing as t
import weakref
from collections import deque

from .uwsgi import threads_go_on

How = t.Literal["thread", "helped", "inline"]


class Process:
    """Stands for the process that made it; in a forked child, for the parent.

    :param forked: Whether this is a child.
    :param lock: For what is done in an instant. Nobody else has it in a child.
    """

    __slots__ = ("forked", "lock")

    def __init__(self) -> None:
        self.forked: bool = False
        self.lock: threading.Lock = threading.Lock()


_process = Process()
_all: weakref.WeakSet[Threads] = weakref.WeakSet()


class Servable(t.Protocol):
    """What has work for a thread: a scope."""

    def serve(self, how: How) -> None:
        """Do all the work there is."""


class Worker:
    """A thread, and what it sleeps on while there is nothing to do."""

    __slots__ = ("asleep", "let_go", "scope", "thread")

    def __init__(self) -> None:
        self.asleep: threading.Lock = threading.Lock()
        self.asleep.acquire()
        # Set while the exit need not wait for it: it has not come yet, has ended or its
        # task was given up.
        self.let_go: threading.Event = threading.Event()
        self.let_go.set()
        # What it serves now.
        self.scope: Servable | None = None
        self.thread: threading.Thread | None = None


class Threads:
    """Lend a limited number of threads, started on demand, to any number of scopes.

    To wake a thread costs more than to run a small task. So at most one is on its way
    at any time. It takes the first scope that waits for one, sends for the next thread
    if more wait, serves the scope, and looks for another one before it sleeps.

    They are daemons, as nothing else lets a process end whose task is stuck. What a
    daemon would lose, the exit of the interpreter waits for (:meth:`end`).

    Guarantees:

    1.  A scope that was added is served after that, unless it is dismissed. Where a
        thread in place of one that is held can't be started, it waits for the next.
    2.  At most ``size`` threads serve, and at most as many are held besides by tasks
        that were given up (:meth:`replace`).

    Assumption: no signal handler raises in the few lines between the choice of a thread
    and its waking.

    What could break it, and what prevents it:

    1.  *Lost scope.* The last thread finds none that waits and sleeps, one is added,
        and nobody is sent for. So while scopes wait, a thread is on its way or all of
        them serve: who arrives, who goes to sleep and who sends for a thread looks and
        decides in one step under the lock. Who adds needs no lock where it sees, after
        it has added, that one is on its way: that one has not looked yet, and will.
    2.  *Nobody comes.* The system has no thread left, or the interpreter exits. Others
        may have relied on the one who is refused. So that one serves all that wait, on
        the spot.
    3.  *A thread that comes though its start failed.* A Ctrl-C may hit who starts it.
        It serves what there is, and counts from then on.
    4.  *Fork.* The child has none of these threads, and a lock that nobody there may
        ever release. So all begin anew in it, before it does anything else.

    :param size: Most threads.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._numbers = itertools.count()
        self.begin()
        _all.add(self)

    def begin(self) -> None:
        """Forget all threads and scopes. Nobody else may use this object meanwhile.

        ``process`` stands for the process that is to use it from now on.
        """
        # Scopes come and are dismissed without the lock: see "Lost scope".
        self._waiting: deque[Servable] = deque()
        # Guards all below, and the choice of the next scope.
        self._lock = threading.Lock()
        self._coming: Worker | None = None
        self._workers: set[Worker] = set()
        self._asleep: list[Worker] = []
        self._overdue: set[Worker] = set()
        self._ended = False
        self.process: Process = _process

    def summon(self, scope: Servable) -> None:
        """Have a thread serve a scope, or do it here if none can be had."""
        self._waiting.append(scope)

        if self._coming is None and not self._send_for_thread():
            self._serve(None)

    def add(self, scope: Servable) -> None:
        """Have a thread serve a scope. If none can be had, who adds it has to."""
        self._waiting.append(scope)

        if self._coming is None:
            self._send_for_thread()

    def _send_for_thread(self) -> bool:
        """Send for a thread, and return whether scopes that wait may rely on one."""
        with self._lock:
            worker = self._choose()

            if worker is None:
                return self._coming is not None or not self._ended

        return self._send(worker)

    def dismiss(self, scope: Servable) -> None:
        """Have no thread serve a scope any more, so that nothing here refers to it."""
        # Without the lock, as it does not matter who comes first.
        try:
            self._waiting.remove(scope)
        except ValueError:
            pass

    def replace(self, scope: Servable) -> int:
        """Have others in place of threads that may be held for ever.

        Each counts again as soon as it is done with its task.

        :param scope: The one that they serve.
        :return: How many are held in all.
        """
        with self._lock:
            for worker in self._workers:
                if worker.scope is scope:
                    self._overdue.add(worker)
                    worker.let_go.set()

            held = len(self._overdue)
            following = self._choose()

        if following is not None:
            self._send(following)

        return held

    def end(self) -> None:
        """Lend no more threads, and wait for those that serve; for the process's exit.

        Not for those that a task holds that was given up, or is meanwhile.
        """
        with self._lock:
            self._ended = True
            awaited = list(self._workers)

            while self._asleep:
                self._asleep.pop().asleep.release()

        for worker in awaited:
            worker.let_go.wait()

    def rouse(self, worker: Worker) -> None:
        """Wake a thread, or start it if it is new.

        :raises RuntimeError: None can be had.
        """
        if worker.thread is not None:
            worker.asleep.release()
            return

        if not threads_go_on():
            raise RuntimeError("No thread but those of requests runs on this server.")

        thread = threading.Thread(
            target=_live,
            args=(weakref.ref(self), worker),
            name=f"apitask_{next(self._numbers)}",
            daemon=True,
        )

        with self._lock:
            if self._ended:
                raise RuntimeError("No thread is started while the process exits.")

            worker.let_go.clear()

        worker.thread = thread
        thread.start()

    def work(self, worker: Worker) -> bool:
        """Serve the scopes that wait.

        :return: Whether the thread is to sleep until more do, and then come again.
        """
        with self._lock:
            if self._coming is worker:
                self._coming = None

            # Again, if its start or its waking has failed, and it comes all the same.
            self._workers.add(worker)
            worker.let_go.clear()

        return self._serve(worker)

    def _serve(self, worker: Worker | None) -> bool:
        while True:
            with self._lock:
                if worker is not None:
                    worker.scope = None

                    if self._returns_too_many(worker):
                        return False

                try:
                    scope = self._waiting.popleft()
                except IndexError:
                    return worker is not None and self._keep(worker)

                following = None

                if worker is not None:
                    worker.scope = scope
                    following = self._choose()

            if following is not None:
                self._send(following)

            scope.serve("inline" if worker is None else "thread")

    def _returns_too_many(self, worker: Worker) -> bool:
        """Count a thread again that was given up, unless there are enough without it.

        Needs the lock.
        """
        if worker not in self._overdue:
            return False

        self._overdue.remove(worker)
        worker.let_go.clear()

        if self._counted() <= self._size:
            return False

        self._workers.remove(worker)
        return True

    def _choose(self) -> Worker | None:
        """Return who is sent for next, if anybody is. Needs the lock."""
        if self._coming or not self._waiting:
            return None

        if self._asleep:
            worker = self._asleep.pop()
        elif self._counted() < self._size and not self._ended:
            worker = Worker()
            self._workers.add(worker)
        else:
            return None

        self._coming = worker
        return worker

    def _send(self, worker: Worker) -> bool:
        """Wake a thread, or start it, and return whether it comes."""
        try:
            self.rouse(worker)
        except BaseException as error:
            # Whatever it was: nobody must rely on a thread that does not come.
            with self._lock:
                if self._coming is worker:
                    self._coming = None
                    self._workers.discard(worker)
                    worker.let_go.set()

            if not isinstance(error, RuntimeError):
                raise

            return False

        return True

    def _keep(self, worker: Worker) -> bool:
        """Put a thread to sleep, unless there are enough. Needs the lock."""
        if self._ended or self._counted() > self._size:
            self._workers.discard(worker)
            return False

        self._asleep.append(worker)
        return True

    def _counted(self) -> int:
        """Count the threads that the limit is for. Needs the lock."""
        return len(self._workers) - min(len(self._overdue), self._size)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} size={self._size} threads={len(self._workers)}"
            f" asleep={len(self._asleep)} overdue={len(self._overdue)}>"
        )

    def __del__(self) -> None:
        # They find it gone, and end.
        for worker in self._asleep:
            worker.asleep.release()


def _live(reference: weakref.ref[Threads], worker: Worker) -> None:
    """Work and sleep by turns. No thread that sleeps keeps the pool."""
    try:
        while (threads := reference()) is not None and threads.work(worker):
            del threads
            worker.asleep.acquire()
    finally:
        worker.let_go.set()


def _after_fork() -> None:
    global _process
    _process.forked = True
    _process = Process()

    for threads in _all:
        threads.begin()


def _end_all() -> None:
    for threads in list(_all):
        threads.end()


# Before any function of atexit, as the standard library's pool does it. A child of
# multiprocessing calls those that are registered here, and none of atexit's.
getattr(threading, "_register_atexit", atexit.register)(_end_all)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
