from __future__ import annotations

import contextlib
import logging
import threading
import time
import typing as t
from collections import deque

from ..log import log
from .barrier import Barrier
from .runner import Runner
from .task import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .future import TaskFuture
    from .pool import ThreadPool
    from .runner import How

_logger = logging.getLogger("flask_apitask")

# Seconds for which a waiting thread lets one thread of the pool work alone before it
# requests more. Small tasks are done by then: a thread wakes within some 20 us.
_HEAD_START: t.Final = 30e-6
# Seconds up to which a task counts as small: about as long as waking a few threads.
_SMALL: t.Final = 200e-6


class TaskQueue:
    """The tasks of a scope, the threads that run them, and those waiting for them.

    What could break it, and what prevents it:

    1.  *Lost wake-up.* A thread finds the cap reached and leaves; the one that is
        running finishes and leaves as well. So giving a slot back and taking the next
        task is one step, under the lock.
    2.  *Late submit.* A task arrives between the last look at the queue and the end. So
        ``_closed`` is set before the wait, and ``submit`` reads it under the lock.
    3.  *A thread that can't come.* One thread is about to queue the scope at a full
        pool; another begins to wait, and finds nothing queued yet. So a thread that
        waits counts itself before it looks at the queue, and the pool queues before it
        looks for waiting threads.
    4.  *Fork.* The child has tasks that run in the parent, and its copy of the lock may
        stay locked for ever. So a fork is checked for before the lock is taken.
    5.  *Interrupted request.* A Ctrl-C hits after a thread was counted as requested,
        but before it was requested, so others would wait for it in vain. So the count
        is reset, and the requests are made again.
    """

    def __init__(
        self,
        pool: ThreadPool,
        max_workers: int,
        timeout: float | None = None,
        runner: Runner | None = None,
    ) -> None:
        self._pool = pool
        self._max_workers = max_workers
        self._timeout = timeout
        # Calls the tasks.
        self.runner: Runner = runner or Runner()
        self._generation = pool.generation
        # Guards everything below. Held only for bookkeeping, never while a task, a done
        # callback or the pool's code runs.
        self._lock = threading.Lock()
        self._queue: deque[TaskFuture[t.Any]] = deque()
        self._running: set[TaskFuture[t.Any]] = set()
        self._barriers: list[Barrier] = []
        self._submitted = 0
        self._unfinished = 0
        # How many requested threads have not come yet.
        self._requested = 0
        # The barrier of a waiting thread that will request more threads in a moment.
        self._head_start: Barrier | None = None
        # How many threads wait. The pool reads it without the lock.
        self.waiters: int = 0
        self._closed = False

    @property
    def _forked(self) -> bool:
        return self._generation != self._pool.generation

    def _add(self, future: TaskFuture[t.Any]) -> int:
        """Queue a task, and return how many threads it may need. Needs the lock."""
        self._submitted = future.index = self._submitted + 1
        self._unfinished += 1
        self._queue.append(future)

        if not self._pool.tasks_are_small:
            return self._max_workers

        # By the time that a second thread is awake, the first one may have done all
        # small tasks. If not, the first one requests the second.
        return 0 if self._requested else 1

    @contextlib.contextmanager
    def waiting(self) -> cabc.Iterator[None]:
        """Make sure that a thread comes while the caller waits for one of the tasks."""
        if self._forked:
            yield
            return

        with self._lock:
            self.waiters += 1

        try:
            self._request_threads(1, renew=True)
            yield
        finally:
            self._stop_waiting()

    def _wait_for(self, future: TaskFuture[t.Any]) -> bool:
        """Queue a future that counts as waited for until :meth:`_stop_waiting`.

        :return: ``False`` if the scope is closed, and nothing was queued.
        """
        with self._lock:
            if self._closed:
                return False

            self.waiters += 1
            self._add(future)

        self._request_threads(1, renew=True)
        return True

    def _stop_waiting(self) -> None:
        with self._lock:
            self.waiters -= 1

    def serve(self, how: How) -> None:
        """Run queued tasks, and request another thread if there are more of them.

        The pool's threads call this. Each requests only the next one, as long as there
        is work left, because waking a thread may take longer than a task.
        """
        with self._lock:
            if how == "thread" and self._requested:
                self._requested -= 1

            future = self._next()
            calls = how == "thread" and self._queue and self._head_start is None

        if future is None:
            return

        if calls:
            self._request_threads(1, serves=True)

        if how == "inline":
            self._pool.warn()

        started, count = time.monotonic(), 0

        while future is not None:
            self._run(future, how)
            count += 1

            if self._generation != self._pool.generation:
                self._leave_to_parent()
                return

            with self._lock:
                following = self._next(future)

            # Not under the lock, because this may drop the last reference to a result.
            future = following

        self._pool.tasks_are_small = (time.monotonic() - started) / count < _SMALL

    @staticmethod
    def _run(future: TaskFuture[t.Any], how: How) -> None:
        """Run a task. Never raises, so that the next task runs in any case."""
        try:
            future.run(how)
        except BaseException as error:
            # Other code may have set the outcome, which only the scope should do.
            log(
                _logger,
                logging.ERROR,
                "The outcome of %r could not be set.",
                future,
                error=error,
            )
        finally:
            # The traceback refers to this frame: avoid a reference cycle.
            del future

    def _join(self, timeout: float | None) -> int:
        """Wait, and return how many of the tasks submitted so far are not done."""
        with self._lock:
            if not self._unfinished:
                return 0

            barrier = Barrier(self._submitted, self._unfinished)
            self._barriers.append(barrier)
            self.waiters += 1

            if len(self._queue) > 1 and self._pool.tasks_are_small:
                self._head_start = barrier

        try:
            self._request_threads(1, renew=True)

            if self._head_start is barrier:
                barrier.sleep(_HEAD_START)

                with self._lock:
                    self._head_start = None

                self._request_threads(self._max_workers)

            barrier.sleep(timeout)
            return barrier.remaining
        finally:
            with self._lock:
                self.waiters -= 1
                self._barriers.remove(barrier)

                # An interrupt has cut it short. Others must not wait for its end.
                if self._head_start is barrier:
                    self._head_start = None

    def _request_threads(
        self, most: int, *, renew: bool = False, serves: bool = False
    ) -> None:
        """Request threads for queued tasks. If none can be had, run the tasks here.

        :param most: Maximum number of threads on their way.
        :param renew: Repeat the requests that are in the pool's queue: now the pool
            sees that a thread waits.
        :param serves: The caller serves the queue anyway.
        """
        lacking = 0

        try:
            withdrawn = self._pool.withdraw(self) if renew else 0

            with self._lock:
                if withdrawn:
                    most = max(most, self._requested)
                    self._requested = max(0, self._requested - withdrawn)

                free = self._max_workers - len(self._running)
                wanted = min(most, len(self._queue), free)

                if wanted > self._requested:
                    lacking, self._requested = wanted - self._requested, wanted

            while lacking and self._pool.request(self):
                lacking -= 1
        except BaseException:
            # A Ctrl-C, for example. Other threads may rely on these requests, and it is
            # not known which of them have been made.
            with self._lock:
                self._requested = 0

            self._request_threads(most, renew=True, serves=serves)
            raise

        if lacking and self._is_alone(lacking) and not serves:
            self.serve("inline")

        # The scope may have ended before these requests could be withdrawn.
        if self._closed:
            self._drop_requests()

    def _is_alone(self, refused: int) -> bool:
        """Return whether no other thread serves the queue or is on its way.

        :param refused: The number of threads that can't be started.
        """
        this = threading.get_ident()

        with self._lock:
            self._requested = max(0, self._requested - refused)
            others = any(future.thread != this for future in self._running)
            return not others and not self._requested

    def _drop_requests(self) -> None:
        """Withdraw useless requests, which would keep the scope's objects alive."""
        if self._requested and not self._queue:
            withdrawn = self._pool.withdraw(self)

            # Or a task that is started later would take one for being on its way.
            with self._lock:
                self._requested = max(0, self._requested - withdrawn)

    def _next(self, done: TaskFuture[t.Any] | None = None) -> TaskFuture[t.Any] | None:
        """Give back the slot of a task, and take the next one. Needs the lock."""
        if done is not None:
            self._give_back(done)

        if not self._queue or len(self._running) >= self._max_workers:
            return None

        future = self._queue.popleft()
        future.thread = threading.get_ident()
        self._running.add(future)
        return future

    def _give_back(self, done: TaskFuture[t.Any]) -> None:
        """Give back the slot of a task that is done. Needs the lock."""
        self._running.remove(done)
        self._unfinished -= 1

        for barrier in self._barriers:
            if done.index <= barrier.last:
                barrier.remaining -= 1

                if not barrier.remaining:
                    barrier.lock.release()

    def _leave_to_parent(self) -> None:
        """Forget all tasks: one of them has forked, and this is the child.

        Nothing waits for them here any more. (If the task ran inline, its thread may be
        one that waits.)
        """
        self._lock = threading.Lock()
        self._queue.clear()

        for barrier in self._barriers:
            barrier.remaining = 0

    def _cancel_queued(self) -> list[str]:
        """Cancel the tasks that no thread has begun, and return their names."""
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
            # They still count as unfinished until _give_back() below.
            self._running.update(queued)

        names = [task_name(future.task) for future in queued if not future.cancelled()]

        for future in queued:
            future.cancel()
            self._run(future, "inline")

            with self._lock:
                self._give_back(future)

        # A commit may have started others meanwhile.
        if self._queue:
            self._request_threads(self._max_workers)

        return names
