from __future__ import annotations

import concurrent.futures
import contextlib
import sys
import threading
import time
import typing as t
import warnings
from collections import deque

from ..exceptions import ScopeClosed
from .future import TaskFuture
from .runner import Runner
from .runner import TimeoutReport
from .task import make_callable
from .task import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .pool import ThreadPool
    from .runner import How

P = t.ParamSpec("P")
T = t.TypeVar("T")

# Seconds that a thread of the pool has to itself before the one that waits calls more
# of them. Small tasks are done by then, and waking a thread takes longer than they do.
# A thread is woken within some 20 us; of a task of 5 ms, this is less than 1 %.
_HEAD_START: t.Final = 30e-6
# Seconds up to which a task counts as small: some wake-ups of a thread.
_SMALL: t.Final = 200e-6


class _Barrier:
    """What a thread sleeps on that waits for the tasks submitted so far.

    All of it is guarded by the scope's lock, but for the sleep.

    :param last: The index of the last of them.
    :param remaining: How many of them are not done.
    """

    __slots__ = ("_asleep", "last", "remaining")

    def __init__(self, last: int, remaining: int) -> None:
        self.last = last
        self.remaining = remaining
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def sleep(self, timeout: float | None) -> None:
        """Sleep until none remains. Not again after that.

        :param timeout: Seconds to sleep at most, ``None`` for as long as it takes.
        """
        limit = -1 if timeout is None else min(max(0, timeout), threading.TIMEOUT_MAX)
        self._asleep.acquire(timeout=limit)

    def count(self, future: TaskFuture[t.Any]) -> None:
        """Count a task as done, and wake the thread if it was the last."""
        if future.index <= self.last:
            self.remaining -= 1

            if not self.remaining:
                self._asleep.release()


class TaskScope(concurrent.futures.Executor):
    """An executor with the lifetime of one request, or of one block of code.

    It has a queue, a cap and an end of its own, and borrows the threads that it runs
    on. :func:`.open_scope` and :class:`.ApiTask` make one; don't make one yourself.
    :func:`concurrent.futures.wait`, :func:`concurrent.futures.as_completed` and
    :meth:`asyncio.loop.run_in_executor` work with it.

    Guarantees:

    1.  A task whose :meth:`submit` returned runs exactly once, unless its future is
        cancelled, the scope is shut down with ``cancel_futures`` or ends at a deadline.
    2.  Tasks begin in the order in which they were submitted, and at most
        ``max_workers`` run at once.
    3.  No task runs on the thread that submits it or waits for it, unless the system
        gives no thread at all. Then it runs there, in order, and a warning says so.
    4.  A scope that is waited for gets a thread, however full the pool is: if need be
        one beyond the pool's size, and at most one for each thread that waits.
    5.  When a wait is over, neither the scope nor its threads refer to the arguments of
        the tasks that it waited for.

    Assumptions: no task waits for a later task of its own scope. No signal handler and
    no finalizer submits: it may interrupt a thread that holds the lock.

    What could break it, and what prevents it:

    1.  *Lost wake-up.* A thread finds the cap reached and leaves; the one that runs
        finishes and leaves as well; the queue is not empty and no thread comes. So a
        slot is given back and the next task taken in one step, under the lock.
    2.  *Late submit.* A task is submitted between the last look at the queue and the
        end. So ``_closed`` is set before the wait, and read by ``submit``, under the
        same lock.
    3.  *A thread that can't come.* One thread is about to queue the scope at a full
        pool; another begins to wait, and finds nothing queued yet that could be
        expedited. So each looks after it has acted: the one that waits counts itself
        before it looks for the request, and the pool queues a request before it looks
        whether somebody waits.
    4.  *Fork.* The child has a copy of the scope, with a lock that nobody may ever
        release, and tasks that run in the parent. So it is closed there, and nobody
        waits for it: that is looked at before the lock is touched.

    :param pool: Where the threads come from.
    :param max_workers: The most tasks that run at once.
    :param timeout: Seconds that :meth:`end` waits, ``None`` for as long as it takes.
    :param runner: Calls the tasks.
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
        self._runner = runner or Runner()
        self._generation = pool.generation
        # Guards everything below. Held for bookkeeping only: never while a task, a done
        # callback or the pool runs.
        self._lock = threading.Lock()
        self._queue: deque[TaskFuture[t.Any]] = deque()
        self._running: set[TaskFuture[t.Any]] = set()
        self._barriers: list[_Barrier] = []
        self._submitted = 0
        self._unfinished = 0
        # How many threads were requested and have not come yet.
        self._requested = 0
        # How many waiting threads have yet to call more threads, if need be.
        self._holding_back = 0
        # How many threads wait. Read by the pool, without the lock.
        self.waiters = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether further tasks are refused. In a forked child they always are."""
        return self._closed or self._forked

    def submit(
        self, fn: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskFuture[T]:
        """Run a task on a thread of the pool, in the Flask context of the caller.

        :param fn: A callable. Every argument after it belongs to it.
        :raises TypeError: ``fn`` can't be called.
        :raises ScopeClosed: The scope has ended. :func:`.run` makes a plain call then.
        """
        task = make_callable(fn)

        if self._forked:
            raise _refusal(task)

        work = task, args, kwargs, time.monotonic()
        future: TaskFuture[T] = TaskFuture(self._runner, self, work)

        with self._lock:
            if self._closed:
                raise _refusal(task)

            self._submitted = future.index = self._submitted + 1
            self._unfinished += 1
            self._queue.append(future)
            # Of small tasks, the thread that comes may have done all by the time that
            # another one is awake. It calls the next thread if it has not.
            waits = self._requested and self._pool.tasks_are_small
            lacking = 0 if waits else self._claim_threads(self._max_workers)

        try:
            if lacking and not self._request_threads(lacking):
                self.serve("inline")

            return future
        finally:
            # The traceback of what failed inline refers to this frame: no cycle.
            del future

    def wait(self, timeout: float | None = None) -> None:
        """Block until the tasks submitted so far are done, however they end.

        :param timeout: Seconds to wait at most, ``None`` for as long as it takes.
        :raises TimeoutError: Some are not done yet. They go on, and so does the scope.
        """
        unfinished = self._join(timeout)

        if unfinished:
            raise TimeoutError(
                f"{unfinished} of the scope's tasks were not done after {timeout} s."
            )

    @contextlib.contextmanager
    def waiting(self) -> cabc.Iterator[None]:
        """Let a thread that waits for one of the tasks in here have its thread."""
        if self._forked:
            yield
            return

        with self._lock:
            self.waiters += 1

        try:
            self._expedite()
            yield
        finally:
            self._stop_waiting()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse further tasks, and wait for those submitted, without a deadline.

        A request's scope is ended for you; call this to end it early. Doing it twice
        is harmless.

        :param wait: Block until the tasks are done.
        :param cancel_futures: Cancel those that no thread has begun.
        """
        if self._forked:
            return

        with self._lock:
            self._closed = True

        if cancel_futures:
            self._cancel_queued()

        if wait:
            self._join(None)

    def end(self) -> None:
        """Refuse further tasks, and wait for those submitted until the deadline.

        The runner reports what is left behind then.
        """
        report = None

        if self._join(self._timeout, close=True) and self._timeout is not None:
            report = self._give_up(self._timeout)

        if self._requested:
            # While it is queued for threads it is kept, and so is the request.
            self._pool.withdraw(self)

        if report is not None:
            self._runner.report(report)

    def serve(self, how: How) -> None:
        """Run what is queued, and have another thread come if there is more of it.

        Called by the threads of the pool. They come one by one, for as long as there is
        work left for them, as waking a thread may take longer than a task does.
        """
        with self._lock:
            self._requested -= how == "thread"
            future = self._take()
            lacking = 0 if self._holding_back else self._claim_threads(1)

        if lacking:
            # Whether one comes or not, this one serves the queue.
            self._request_threads(1)

        if how == "inline" and future is not None:
            self._pool.warn()

        started, count = time.monotonic(), 0

        while future is not None:
            future.run(how)
            future = self._finish(future)
            count += 1

        if count:
            self._pool.tasks_are_small = (time.monotonic() - started) / count < _SMALL

    @property
    def _forked(self) -> bool:
        return self._generation != self._pool.generation

    def _join(self, timeout: float | None, *, close: bool = False) -> int:
        """Wait, and return how many of the tasks submitted so far are not done."""
        if self._forked:
            return 0

        with self._lock:
            self._closed |= close

            if not self._unfinished:
                return 0

            barrier = _Barrier(self._submitted, self._unfinished)
            self._barriers.append(barrier)
            self.waiters += 1
            holds_back = len(self._queue) > 1 and self._pool.tasks_are_small
            self._holding_back += holds_back

        try:
            if holds_back:
                self._give_head_start(barrier)
            else:
                self._expedite()

            if barrier.remaining:
                barrier.sleep(timeout)

            return barrier.remaining
        finally:
            self._stop_waiting(barrier)

    def _give_head_start(self, barrier: _Barrier) -> None:
        """Have all threads come that there is work for, but not at once."""
        try:
            self._expedite()
            barrier.sleep(_HEAD_START)
        finally:
            with self._lock:
                self._holding_back -= 1
                lacking = self._claim_threads(self._max_workers)

            self._request_threads(lacking)

    def _stop_waiting(self, barrier: _Barrier | None = None) -> None:
        with self._lock:
            self.waiters -= 1

            if barrier is not None:
                self._barriers.remove(barrier)

    def _expedite(self) -> None:
        """Let no request for a thread queue at the pool while this thread waits."""
        with self._lock:
            lacking = self._claim_threads(1)

        # One that queues is made anew: the pool sees now that it is waited for.
        if lacking or self._pool.withdraw(self, 1):
            if not self._request_threads(1):
                self.serve("inline")

    def _claim_threads(self, most: int) -> int:
        """Return how many threads to request now, and note that. Needs the lock."""
        if not self._queue:
            return 0

        free = self._max_workers - len(self._running)
        lacking = max(0, min(most, len(self._queue), free) - self._requested)
        self._requested += lacking
        return lacking

    def _request_threads(self, count: int) -> bool:
        """Request threads that were claimed, and return whether all of them come."""
        try:
            while count and self._pool.request(self):
                count -= 1
        except BaseException:
            # A Ctrl-C. Other threads may rely on these requests.
            self._request_threads(count)
            raise

        if count:
            with self._lock:
                self._requested -= count

        if self._closed and not self._queue:
            # The scope has ended meanwhile, before a request could be withdrawn.
            self._pool.withdraw(self)

        return not count

    def _take(self) -> TaskFuture[t.Any] | None:
        """Move the first queued task to the running ones. Needs the lock."""
        if not self._queue or len(self._running) >= self._max_workers:
            return None

        future = self._queue.popleft()
        future.thread = threading.get_ident()
        self._running.add(future)
        return future

    def _finish(self, future: TaskFuture[t.Any]) -> TaskFuture[t.Any] | None:
        """Give back the slot of a task that is done, and take the next one."""
        if self._forked:
            # The task has forked. What else there is to do is for the parent, and not
            # waited for in here, where the task may have run inline.
            self._lock = threading.Lock()
            self._queue.clear()

            for barrier in self._barriers:
                barrier.remaining = 0

            return None

        with self._lock:
            self._running.remove(future)
            self._unfinished -= 1

            for barrier in self._barriers:
                barrier.count(future)

            return self._take()

    def _cancel_queued(self) -> list[str]:
        """Cancel what no thread has begun, and return the names."""
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
            # So that they count as unfinished until they are done.
            self._running.update(queued)

        names = [future.task_name for future in queued if not future.cancelled()]

        for future in queued:
            future.cancel()
            future.run("inline")
            self._finish(future)

        return names

    def _give_up(self, timeout: float) -> TimeoutReport | None:
        """Cancel what is queued, and let other threads replace those that run."""
        cancelled = self._cancel_queued()

        with self._lock:
            running = list(self._running)

        frames = sys._current_frames()

        try:
            stuck = [found for future in running if (found := future.describe(frames))]
        finally:
            # This frame is one of them: no cycle through it.
            del frames

        abandoned = self._pool.abandon(self)
        left = cancelled or stuck
        return TimeoutReport(timeout, cancelled, stuck, abandoned) if left else None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<{type(self).__name__} {state} queued={len(self._queue)}"
            f" running={len(self._running)} max_workers={self._max_workers}>"
        )

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._submitted and not self.closed:
            warnings.warn(
                f"{self!r} was never ended. Use 'with open_scope()'.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


def _refusal(fn: object) -> ScopeClosed:
    return ScopeClosed(
        f"Task {task_name(fn)!r} was submitted to a scope that has ended. Submit"
        " before the end of the request or of the 'with' block, or use run(), which"
        " then calls the task on the spot."
    )
