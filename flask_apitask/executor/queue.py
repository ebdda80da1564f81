from __future__ import annotations

import contextlib
import logging
import threading
import time
import typing as t
from collections import deque

from ..log import log
from .runner import Runner
from .task import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .future import TaskFuture
    from .pool import ThreadPool
    from .runner import How

_logger = logging.getLogger("flask_apitask")

# Seconds that one thread of the pool has to itself before a waiting one calls more.
# Small tasks are done by then: a thread wakes within some 20 us.
_HEAD_START: t.Final = 30e-6
# Seconds up to which a task counts as small: some wake-ups of a thread.
_SMALL: t.Final = 200e-6


class _Barrier:
    """What a thread sleeps on that waits for tasks. Guarded by the scope's lock.

    :param last: The index of the last of them.
    :param remaining: How many of them are not done.
    """

    __slots__ = ("last", "lock", "remaining")

    def __init__(self, last: int, remaining: int) -> None:
        self.last = last
        self.remaining = remaining
        # Held until none remains.
        self.lock = threading.Lock()
        self.lock.acquire()

    def sleep(self, timeout: float | None) -> None:
        """Sleep until none remains, without the scope's lock."""
        if self.remaining:
            limit = -1 if timeout is None else max(0, timeout)
            self.lock.acquire(timeout=min(limit, threading.TIMEOUT_MAX))


class TaskQueue:
    """The tasks of a scope, the threads that run them, and those that wait for them.

    What could break it, and what prevents it:

    1.  *Lost wake-up.* A thread finds the cap reached and leaves; the one that runs
        finishes and leaves as well. So a slot is given back and the next task taken in
        one step, under the lock.
    2.  *Late submit.* A task comes between the last look at the queue and the end. So
        ``_closed`` is set before the wait, and read by ``submit``, under the lock.
    3.  *A thread that can't come.* One thread is about to queue the scope at a full
        pool; another begins to wait, and finds nothing queued yet. So the one that
        waits counts itself before it looks, and the pool queues before it looks.
    4.  *Fork.* The child has tasks that run in the parent, and a lock that nobody may
        ever release. So whether it is a child is looked at before the lock is touched.
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
        # What calls the tasks.
        self.runner: Runner = runner or Runner()
        self._generation = pool.generation
        # Guards everything below. Held for bookkeeping only: never while a task, a done
        # callback or the pool runs.
        self._lock = threading.Lock()
        self._queue: deque[TaskFuture[t.Any]] = deque()
        self._running: set[TaskFuture[t.Any]] = set()
        self._barriers: list[_Barrier] = []
        self._submitted = 0
        self._unfinished = 0
        # How many threads are yet to come.
        self._requested = 0
        # Of the thread that is going to call more of them in a moment.
        self._head_start: _Barrier | None = None
        # How many threads wait. Read by the pool, without the lock.
        self.waiters: int = 0
        self._closed = False

    @property
    def _forked(self) -> bool:
        return self._generation != self._pool.generation

    def _add(self, future: TaskFuture[t.Any]) -> int:
        """Queue a task, and return how many threads to request. Needs the lock."""
        self._submitted = future.index = self._submitted + 1
        self._unfinished += 1
        self._queue.append(future)
        # The thread that comes may have done all small tasks by the time that another
        # one is awake. If not, it calls that.
        waits = self._requested and self._pool.tasks_are_small
        return 0 if waits else self._claim_threads(self._max_workers)

    @contextlib.contextmanager
    def waiting(self) -> cabc.Iterator[None]:
        """Let a thread that waits for one of the tasks in here have its thread."""
        if self._forked:
            yield
            return

        with self._lock:
            self.waiters += 1
            lacking = self._claim_threads(1)

        try:
            self._expedite(lacking)
            yield
        finally:
            self._stop_waiting()

    def _wait_for(self, future: TaskFuture[t.Any]) -> bool:
        """Queue what counts as waited for until :meth:`_stop_waiting`, if that is open.

        :return: Whether it is open.
        """
        with self._lock:
            if self._closed:
                return False

            self.waiters += 1
            lacking = self._add(future)

        self._expedite(lacking)
        return True

    def _stop_waiting(self) -> None:
        with self._lock:
            self.waiters -= 1

    def serve(self, how: How) -> None:
        """Run what is queued, and have another thread come if there is more of it.

        Called by the threads of the pool. They come one by one, for as long as there is
        work left for them, as waking a thread may take longer than a task does.
        """
        with self._lock:
            self._requested -= how == "thread"
            future = self._next()
            calls = how == "thread" and self._head_start is None
            lacking = self._claim_threads(1) if calls else 0

        if future is None:
            return

        if lacking:
            self._request_threads(lacking, serves=True)

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

            # Not under the lock, as it may be the last reference to a result.
            future = following

        self._pool.tasks_are_small = (time.monotonic() - started) / count < _SMALL

    @staticmethod
    def _run(future: TaskFuture[t.Any], how: How) -> None:
        """Run a task. Whatever happens to its future, the next one has its turn."""
        try:
            future.run(how)
        except BaseException as error:
            # Somebody has set the outcome, say, which is for the scope to do.
            log(
                _logger,
                logging.ERROR,
                "%r can't have its outcome.",
                future,
                error=error,
            )
        finally:
            # What failed refers to this frame, as its caller: no cycle through it.
            del future

    def _join(self, timeout: float | None) -> int:
        """Wait, and return how many of the tasks submitted so far are not done."""
        with self._lock:
            if not self._unfinished:
                return 0

            barrier = _Barrier(self._submitted, self._unfinished)
            self._barriers.append(barrier)
            self.waiters += 1
            lacking = self._claim_threads(1)

            if len(self._queue) > 1 and self._pool.tasks_are_small:
                self._head_start = barrier

        try:
            self._expedite(lacking)

            if self._head_start is barrier:
                barrier.sleep(_HEAD_START)

                with self._lock:
                    self._head_start = None
                    lacking = self._claim_threads(self._max_workers)

                self._request_threads(lacking)

            barrier.sleep(timeout)
            return barrier.remaining
        finally:
            with self._lock:
                self.waiters -= 1
                self._barriers.remove(barrier)

    def _expedite(self, lacking: int) -> None:
        """Request threads such that none queues at the pool while this one waits."""
        # What queues is requested anew: the pool sees now that it is waited for.
        if lacking := lacking or self._pool.withdraw(self):
            self._request_threads(lacking)

    def _claim_threads(self, most: int) -> int:
        """Return how many threads to request now, and note that. Needs the lock."""
        if not self._queue:
            return 0

        free = self._max_workers - len(self._running)
        lacking = min(most, len(self._queue), free) - self._requested

        if lacking <= 0:
            return 0

        self._requested += lacking
        return lacking

    def _request_threads(self, count: int, *, serves: bool = False) -> None:
        """Request threads that were claimed, and do without if there are none at all.

        :param serves: This thread serves the queue anyway.
        """
        try:
            while count and self._pool.request(self):
                count -= 1
        except BaseException:
            # A Ctrl-C. Other threads may rely on these requests.
            self._request_threads(count, serves=serves)
            raise

        if count:
            this = threading.get_ident()

            with self._lock:
                self._requested -= count
                others = any(future.thread != this for future in self._running)
                alone = not (serves or others or self._requested)

            if alone:
                self.serve("inline")

        # It may have ended before a request could be withdrawn.
        if self._closed:
            self._drop_requests()

    def _drop_requests(self) -> None:
        """Let the pool not keep a scope, and so a request, that needs no thread."""
        if self._requested and not self._queue:
            self._pool.withdraw(self)

    def _next(self, done: TaskFuture[t.Any] | None = None) -> TaskFuture[t.Any] | None:
        """Give back the slot of a task, and take the next one. Needs the lock."""
        if done is not None:
            self._running.remove(done)
            self._unfinished -= 1

            for barrier in self._barriers:
                if done.index <= barrier.last:
                    barrier.remaining -= 1

                    if not barrier.remaining:
                        barrier.lock.release()

        if not self._queue or len(self._running) >= self._max_workers:
            return None

        future = self._queue.popleft()
        future.thread = threading.get_ident()
        self._running.add(future)
        return future

    def _leave_to_parent(self) -> None:
        """Forget all tasks: one has forked, and this is the child.

        Nor are they waited for in here, where the task may have run inline.
        """
        self._lock = threading.Lock()
        self._queue.clear()

        for barrier in self._barriers:
            barrier.remaining = 0

    def _cancel_queued(self) -> list[str]:
        """Cancel what no thread has begun, and return the names."""
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
            # So that they count as unfinished until they are done.
            self._running.update(queued)

        names = [task_name(future.task) for future in queued if not future.cancelled()]

        for future in queued:
            future.cancel()
            self._run(future, "inline")

            with self._lock:
                self._next(future)

        return names
