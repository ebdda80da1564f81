from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import threading
import time
import typing as t
import weakref
from collections import deque

from ..log import log
from .worker import threads_enabled
from .worker import Worker

if t.TYPE_CHECKING:
    from .overdue import OverdueTask
    from .queue import TaskQueue

_logger = logging.getLogger("flask_apitask")
_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


class ThreadPool:
    """Threads that serve any number of scopes. Started on demand, and kept.

    A scope gets an idle thread or a new one. If there are ``size`` threads already, it
    queues until one is free.

    The threads are daemons, because a stuck task would otherwise keep the process from
    exiting. The interpreter's exit still waits for those that are busy (:meth:`close`).

    1.  A scope that requests a thread gets one, or learns at once that there is none.
    2.  At most ``size`` threads are busy or idle. Two kinds are not counted: at most
        one extra thread for each thread that waits for a scope, and up to ``size``
        threads abandoned with a stuck task (:meth:`abandon`).
    3.  A thread keeps no reference to the code that started it or to a scope that it
        has served.

    What could break it, and what prevents it:

    1.  *Lost scope.* A thread finds the queue empty and goes idle, while a scope that
        saw no idle thread queues. So each looks and decides in one step, under the
        lock.
    2.  *Fork.* The child has none of the threads, and its copy of the lock may stay
        locked for ever. So the pool is reset in the child before anything else runs.
    3.  *Interrupted request.* A Ctrl-C hits after a worker was chosen, perhaps in
        :meth:`threading.Thread.start`, so nobody knows whether the thread will run. So
        the worker is given up: if its thread does run, it notices and ends. A worker
        does nothing until it is woken, which is the last step.

    :param size: Maximum number of threads, with the exceptions above.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._numbers = itertools.count()
        # How often this process and those before it have forked.
        self.generation = 0
        # Whether the last tasks took less time than waking a few threads.
        self.tasks_are_small = True
        self.reset()
        _pools.add(self)

    def reset(self) -> None:
        """Forget all threads and scopes, for a forked child."""
        # Guards everything below, and the scope of each worker.
        self._lock = threading.Lock()
        # Notified when a worker is done or abandoned while the pool closes.
        self._settled = threading.Condition(self._lock)
        self._waiting: deque[TaskQueue] = deque()
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._abandoned: dict[Worker, OverdueTask] = {}
        # Why no thread could be started last time, and the causes warned about so far.
        self._refusal = ""
        self._warned: set[str] = set()
        self._closed = False

    def request(self, scope: TaskQueue | None) -> bool:
        """Let a thread serve a scope as soon as one is free.

        If none is free and a thread waits for the scope, start an extra one.

        :param scope: ``None`` to wake a thread for the scopes that are queued.
        :return: ``False`` if no thread can be started, so none will come. Without a
            scope, also if none is free.
        """
        worker: Worker | None = None

        try:
            with self._lock:
                if self._closed:
                    self._refusal = "the process is about to exit."
                    return False

                worker = self._find_worker() or self._queue(scope)

                if worker is None:
                    return scope is not None

                worker.scope = scope
                self._busy.add(worker)
                # If a worker is idle, the last one is the one chosen.
                del self._idle[-1:]

            if not worker.ident:
                self._start(worker)
        except BaseException as error:
            if worker is not None:
                self._give_up(worker)

                # Others may have queued because this worker was to come.
                if scope is not None and self._waiting:
                    self.request(None)

            if not isinstance(error, Exception):
                raise

            self._refusal = str(error) or repr(error)
            return False

        # The last step, so that an interrupt comes either before it or after it.
        worker.awake.release()
        return True

    def withdraw(self, scope: TaskQueue) -> int:
        """Drop a scope's queued requests, and return how many there were."""
        # A fast path: this is called for each HTTP request, and mostly nothing queues.
        if not self._waiting:
            return 0

        with self._lock:
            count = self._waiting.count(scope)

            for _ in range(count):
                self._waiting.remove(scope)

        return count

    def abandon(self, scope: TaskQueue, overdue: list[OverdueTask]) -> int:
        """Stop counting the threads held by a scope's overdue tasks, until they end.

        :return: How many threads are abandoned now, by any scope.
        """
        tasks = {task.thread: task for task in overdue}

        with self._lock:
            for worker in self._busy:
                # The worker may have moved on to another scope meanwhile.
                if worker.scope is scope and worker.ident in tasks:
                    self._abandoned[worker] = tasks[worker.ident]

            self._settled.notify_all()
            return len(self._abandoned)

    def replace_abandoned(self) -> None:
        """Let other threads take the places of abandoned ones."""
        # The new thread only takes a scope off the queue once it runs. Until then, a
        # thread that begins to wait still finds its scope there.
        while self._waiting and self.request(None):
            pass

    def close(self, started: float) -> None:
        """Refuse further requests and wait for the busy threads: the process exits.

        A thread that is abandoned, before or during the wait, is only given its task's
        ``exit_grace``. A WARNING names the tasks left behind.

        :param started: When the exit began, in seconds of :func:`time.monotonic`.
        """
        with self._lock:
            self._closed = True

            for worker in self._idle:
                worker.awake.release()

            self._idle.clear()

            while (grace := started + self._exit_grace() - time.monotonic()) > 0:
                self._settled.wait(None if grace > threading.TIMEOUT_MAX else grace)

            left = [task.name for task in self._abandoned.values()]

        if left:
            log(
                _logger,
                logging.WARNING,
                "The process exits without waiting any longer for %d task(s) past their"
                " deadline: %s",
                len(left),
                ", ".join(map(repr, left)),
            )

    def _exit_grace(self) -> float:
        """Return for how many seconds the exit may wait. Needs the lock."""
        if self._busy <= self._abandoned.keys():
            graces = [task.exit_grace for task in self._abandoned.values()]
            return max(graces, default=0)

        return math.inf

    def warn(self) -> None:
        """Warn, once per cause, that tasks run inline for want of a thread."""
        if self._refusal not in self._warned:
            self._warned.add(self._refusal)
            log(
                _logger,
                logging.WARNING,
                "No thread can be started for tasks, so they run one after the other"
                " where they are started or waited for: %s",
                self._refusal,
            )

    def work(self, worker: Worker) -> bool:
        """Serve scopes until none waits.

        :return: Whether the thread is to sleep until it is woken, or else to end.
        """
        scope, stays = worker.scope, True

        if scope is None:
            scope, stays = self._next_scope(worker)

        while scope is not None:
            scope.serve("thread")
            scope, stays = self._next_scope(worker)

        return stays

    def _next_scope(self, worker: Worker) -> tuple[TaskQueue | None, bool]:
        """Return the next scope for a worker, and whether the worker stays."""
        with self._lock:
            self._abandoned.pop(worker, None)
            scope = worker.scope

            # The scope has queued again while this worker still counted as serving it.
            if scope is not None and worker.extra and scope in self._waiting:
                self._waiting.remove(scope)
                return scope, True

            worker.scope = None
            worker.extra = False
            # A worker is not among the busy ones if it was given up, or in the child of
            # a task that forked.
            surplus = worker not in self._busy or self._count() > self._size

            if self._waiting and not surplus:
                worker.scope = self._waiting.popleft()
                return worker.scope, True

            self._busy.discard(worker)

            if surplus or self._closed:
                self._settled.notify_all()
                return None, False

            self._idle.append(worker)
            return None, True

    def _find_worker(self) -> Worker | None:
        """Return an idle or new worker, or ``None``. Needs the lock."""
        if self._idle:
            return self._idle[-1]

        return Worker() if self._count() < self._size else None

    def _queue(self, scope: TaskQueue | None) -> Worker | None:
        """Queue a scope, or return an extra worker for it. Needs the lock."""
        if scope is None:
            return None

        self._waiting.append(scope)
        # Look only after queueing: a thread that begins to wait counts itself before it
        # looks at the queue.
        waiters = scope.waiters
        serving = [worker for worker in self._busy if worker.scope is scope]

        if waiters <= sum(worker.extra for worker in serving):
            return None

        self._waiting.pop()
        return Worker(extra=True)

    def _count(self) -> int:
        """Count the threads that ``size`` limits. Needs the lock."""
        counted = len(self._busy) + len(self._idle)
        return counted - min(len(self._abandoned), self._size)

    def _give_up(self, worker: Worker) -> None:
        """Forget a worker that could not be woken."""
        with self._lock:
            worker.scope = None
            self._busy.discard(worker)
            self._idle = [other for other in self._idle if other is not worker]
            self._settled.notify_all()

        # If the thread runs after all, it ends.
        worker.awake.release()

    def _start(self, worker: Worker) -> None:
        """Start a worker's thread.

        :raises RuntimeError: No thread can be started.
        """
        if not threads_enabled():
            raise RuntimeError(
                "this uWSGI runs no threads but those that serve requests. Add"
                " 'enable-threads = true' to its configuration."
            )

        worker.start(f"apitask_{next(self._numbers)}", weakref.ref(self))

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} size={self._size} busy={len(self._busy)}"
            f" idle={len(self._idle)} abandoned={len(self._abandoned)}"
            f" waiting={len(self._waiting)}>"
        )

    def __del__(self) -> None:
        # The idle workers wake, find the pool gone, and end.
        for worker in self._idle:
            worker.awake.release()


def _close_all() -> None:
    started = time.monotonic()

    for pool in list(_pools):
        pool.close(started)


def _reset_all() -> None:
    for pool in _pools:
        pool.generation += 1
        pool.reset()


# This runs before any atexit function, as the standard library's pool does. Besides, a
# child of multiprocessing calls the functions registered here, but none of atexit's.
getattr(threading, "_register_atexit", atexit.register)(_close_all)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
