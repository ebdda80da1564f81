from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
import typing as t
import warnings
from collections import deque

from ..exceptions import ScopeClosed
from .future import TaskFuture
from .overdue import find_overdue
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

    __slots__ = ("last", "lock", "remaining")

    def __init__(self, last: int, remaining: int) -> None:
        self.last = last
        self.remaining = remaining
        # Held until none remains.
        self.lock = threading.Lock()
        self.lock.acquire()

    def sleep(self, timeout: float | None) -> None:
        """Sleep until none remains.

        :param timeout: Seconds to sleep at most, ``None`` for as long as it takes.
        """
        if self.remaining:
            limit = -1 if timeout is None else max(0, timeout)
            self.lock.acquire(timeout=min(limit, threading.TIMEOUT_MAX))


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
        # What the thread sleeps on that is going to call more threads in a moment.
        self._head_start: _Barrier | None = None
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
        task: t.Any = fn

        if not callable(task):
            task = make_callable(task)

        if self._generation != self._pool.generation:
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
            if lacking:
                self._request_threads(lacking)

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
            lacking = self._claim_threads(1)

        try:
            self._expedite(lacking)
            yield
        finally:
            with self._lock:
                self.waiters -= 1

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

        self._drop_requests()

    def end(self) -> None:
        """Refuse further tasks, and wait for those submitted until the deadline.

        The runner reports what is left behind then.
        """
        if self._join(self._timeout, close=True) and self._timeout is not None:
            self._give_up(self._timeout)

        self._drop_requests()

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
            self._request_threads(1, serves=True)

        if how == "inline":
            self._pool.warn()

        started, count = time.monotonic(), 0

        while future is not None:
            future.run(how)
            count += 1

            if self._generation != self._pool.generation:
                self._leave_to_parent()
                return

            with self._lock:
                following = self._next(future)

            # Not under the lock, as it may be the last reference to a result.
            future = following

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
            lacking = self._claim_threads(1)

            if len(self._queue) > 1 and self._pool.tasks_are_small:
                self._head_start = self._head_start or barrier

        try:
            self._expedite(lacking)

            if self._head_start is barrier:
                barrier.sleep(_HEAD_START)
                self._end_head_start()

            barrier.sleep(timeout)
            return barrier.remaining
        finally:
            with self._lock:
                self.waiters -= 1
                self._barriers.remove(barrier)

                # After a Ctrl-C.
                if self._head_start is barrier:
                    self._head_start = None

    def _end_head_start(self) -> None:
        """Have all threads come that there is work left for."""
        with self._lock:
            self._head_start = None
            lacking = self._claim_threads(self._max_workers)

        self._request_threads(lacking)

    def _expedite(self, lacking: int) -> None:
        """Let no request for a thread queue at the pool while this thread waits.

        :param lacking: How many threads were claimed.
        """
        # What queues is requested anew: the pool sees now that it is waited for.
        lacking = lacking or self._pool.withdraw(self)

        if lacking:
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

        # The scope may have ended before a request could be withdrawn.
        self._drop_requests()

    def _drop_requests(self) -> None:
        """Let the pool not keep a scope, and so a request, that needs no thread."""
        if self._closed and self._requested and not self._queue:
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
            future.run("inline")

            with self._lock:
                self._next(future)

        return names

    def _give_up(self, timeout: float) -> None:
        """Cancel what is queued, have what runs replaced, and report both."""
        cancelled = self._cancel_queued()

        with self._lock:
            running = list(self._running)

        overdue = find_overdue(running, timeout)
        abandoned = self._pool.abandon(self, overdue)

        if cancelled or overdue:
            stacks = [(task.name, task.stack) for task in overdue]
            self._runner.report(TimeoutReport(timeout, cancelled, stacks, abandoned))

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
