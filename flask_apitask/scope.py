from __future__ import annotations

import concurrent.futures
import sys
import threading
import typing as t
import warnings
from collections import deque

from .exceptions import ScopeClosed
from .jobs import Job
from .jobs import Overdue
from .jobs import UNBOUND
from .locks import BargingLock
from .tasks import make_callable
from .tasks import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .jobs import Binding
    from .threads import How
    from .threads import Threads

P = t.ParamSpec("P")
T = t.TypeVar("T")

# Later than the index of any job.
_EVER = float("inf")


class _Waiter:
    """A thread that waits for the tasks up to an index.

    All of it is guarded by the scope's lock, but for the sleep.

    :param last: The index.
    :param remaining: How many of them are not done.
    :param helps: Whether the thread runs tasks meanwhile.
    """

    __slots__ = ("_asleep", "helps", "last", "remaining")

    def __init__(self, last: int, remaining: int, helps: bool) -> None:
        self.last = last
        self.remaining = remaining
        self.helps = helps
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def sleep(self, timeout: float) -> None:
        """Sleep until woken, or not at all if that was before.

        :param timeout: Seconds, ``-1`` for as long as it takes.
        """
        self._asleep.acquire(timeout=timeout)

    def wake(self) -> None:
        """Let the thread look again. Needs the scope's lock."""
        if self._asleep.locked():
            self._asleep.release()


class TaskScope(concurrent.futures.Executor):
    """An executor with the lifetime of one request, or of one block of code.

    It has its own queue, its own cap and its own end, and borrows the threads that it
    runs on. :func:`.open_scope` and :class:`.ApiTask` make one; make none yourself.
    :func:`concurrent.futures.wait`, :func:`concurrent.futures.as_completed` and
    :meth:`asyncio.loop.run_in_executor` work with it.

    Guarantees:

    1.  A task whose :meth:`submit` returned runs exactly once, unless its future is
        cancelled, the scope is shut down with ``cancel_futures`` or ends at a deadline.
    2.  Tasks begin in the order in which they were submitted, and at most
        ``max_workers`` run at once, the helping thread included.
    3.  Without a timeout, a wait needs no thread of the pool: the waiting thread runs
        what no thread has begun. A pool that is full, or gone, delays nobody for ever.
    4.  When a wait is over, neither the scope nor its threads refer to the arguments of
        the tasks that it waited for.

    Assumptions: what a job calls does not wait for a later job of the same scope, nor
    in ``result()`` for one of another scope that no thread has begun. No signal handler
    and no finalizer submits: it may interrupt who holds the lock.

    What could break it, and what prevents it:

    1.  *Lost wake-up.* A thread finds the cap reached and leaves; the one that runs
        finishes and leaves as well; the queue is not empty and nobody comes. So a slot
        is given back, and the next job taken or a thread summoned for it, in one step
        under the lock (``_finish``), never in two.
    2.  *Late submit.* A task is submitted between the last look at the queue and the
        end. So ``_closed`` is set before the wait, and read by ``submit``, under the
        same lock.
    3.  *Helper that leaves.* A thread that waits finds the cap reached and sleeps. The
        helper that runs then leaves at its own barrier, and the thread it summons never
        comes. So who leaves work behind wakes one that waits for it (``_wake_helper``).
        That one looks once more after it can be woken, and before it sleeps.
    4.  *Summoned for nothing.* The helper takes the job before the summoned thread
        arrives. That thread finds nothing it may take and goes on; what is capped is
        ``_running``, not the number of threads on their way.
    5.  *Nobody can be summoned.* Then :class:`.Threads` has the summoning thread serve
        the queue. One that has taken a job already must not run a later one before it:
        it only adds the scope (``serve``), and comes to the queue after its job.
    6.  *Fork.* The child has a copy of the scope, with a lock that nobody may ever give
        back and tasks that run in the parent. So it is closed there, and nobody waits
        for it: that is read from ``_process`` before the lock is touched.

    :param threads: Where the threads come from.
    :param max_workers: Most tasks that run at once.
    :param timeout: Seconds that :meth:`end` waits, ``None`` for as long as it takes.
    :param binding: What the tasks find around them.
    """

    def __init__(
        self,
        threads: Threads,
        max_workers: int,
        timeout: float | None = None,
        binding: Binding = UNBOUND,
    ) -> None:
        self._threads = threads
        self._max_workers = max_workers
        self._timeout = timeout
        self._binding = binding
        # Guards all below. Held for bookkeeping only: never while a task, a callback
        # of a future or the pool runs.
        self._lock = BargingLock()
        self._queue: deque[Job[t.Any]] = deque()
        self._running: set[Job[t.Any]] = set()
        self._waiters: list[_Waiter] = []
        self._submitted = 0
        self._unfinished = 0
        self._summoned = False
        self._closed = False
        self._process = threads.process

    @property
    def closed(self) -> bool:
        """Whether further tasks are refused. They are in a forked child, too."""
        return self._closed or self._process.forked

    def submit(
        self, fn: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Run a task on a thread of the pool, in the Flask context of the caller.

        :param fn: A callable. Every argument after it belongs to it.
        :raises TypeError: ``fn`` can't be called.
        :raises ScopeClosed: The scope has ended. :func:`.run` makes a plain call then.
        """
        return self.submit_call(fn, args, kwargs)

    def submit_call(
        self, fn: t.Any, args: tuple[t.Any, ...], kwargs: dict[str, t.Any]
    ) -> concurrent.futures.Future[t.Any]:
        """Do as :meth:`submit` does, with arguments that are packed already."""
        if not callable(fn):
            fn = make_callable(fn)

        if self._process.forked:
            raise self._refusal(fn)

        job: Job[t.Any] = Job(fn, args, kwargs)
        future: concurrent.futures.Future[t.Any] = job.future

        with self._lock:
            summon = closed = self._closed

            if not closed:
                self._submitted = job.index = self._submitted + 1
                self._unfinished += 1
                self._queue.append(job)
                summon = self._may_summon()

        if closed:
            raise self._refusal(fn)

        if summon:
            self._threads.summon(self)

        try:
            return future
        finally:
            # The traceback of what failed inline refers to this frame: no cycle.
            del future, job

    @staticmethod
    def _refusal(fn: object) -> ScopeClosed:
        return ScopeClosed(
            f"Task {task_name(fn)!r} was submitted to a scope that has ended. Submit"
            " before the end of the request or of the 'with' block, or use run(), which"
            " then calls the task on the spot."
        )

    def wait(self, timeout: float | None = None) -> None:
        """Block until the tasks submitted so far are done, however they end.

        The waiting thread helps: it runs tasks that no thread has begun. With a timeout
        it does not, as it could not leave in time.

        :param timeout: Seconds to wait at most, ``None`` for as long as it takes.
        :raises TimeoutError: Some are not done yet. They go on, and so does the scope.
        """
        unfinished = self._join(timeout)

        if unfinished:
            raise TimeoutError(
                f"{unfinished} of the scope's tasks were not done after {timeout} s."
            )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse further tasks, and wait for those submitted, without a deadline.

        A request's scope is ended for you; call this to end it early. Doing it twice
        is harmless.

        :param wait: Block until the tasks are done.
        :param cancel_futures: Cancel those that no thread has begun.
        """
        if self._process.forked:
            return

        with self._lock:
            self._closed = True

        if cancel_futures:
            self._cancel_queued()

        if wait:
            self._join(None)

    def end(self) -> None:
        """Refuse further tasks, and wait for those submitted until the deadline.

        What it leaves behind there, the binding reports.
        """
        overdue = None

        if self._join(self._timeout, close=True) and self._timeout is not None:
            overdue = self._give_up(self._timeout)

        if self._summoned:
            # While it waits for a thread it is kept, and so is the request.
            self._threads.dismiss(self)

        if overdue is not None:
            self._binding.report(overdue)

    def serve(self, how: How) -> None:
        """Run what is queued, and have the next thread come if there is more of it.

        For :class:`.Threads`. So threads come one by one, for as long as there is work
        left for them, and not one for each task.
        """
        with self._lock:
            self._summoned = False
            # In a list: this frame must not keep the job while later ones run.
            taken = [self._take(_EVER)]
            summon = bool(self._queue) and self._may_summon()

        if summon:
            # Refused or not: this thread is about to serve the queue.
            self._threads.add(self)

            if self._closed and not self._queue:
                # It has ended meanwhile, and was dismissed before it was added.
                self._threads.dismiss(self)

        self._run(taken.pop(), how, _EVER)

    def _join(self, timeout: float | None, *, close: bool = False) -> int:
        """Wait, and return how many of the tasks submitted so far are not done."""
        # To be looked at once more below, after tasks that may fork.
        process = self._process

        if process.forked:
            return 0

        helps = timeout is None

        with self._lock:
            self._closed |= close
            last = self._submitted
            job = self._take(last) if helps else None

        self._run(job, "helped", last)

        # Read without the lock: it is one number, and 0 only when nothing is left.
        if not self._unfinished or self._process.forked:
            return 0

        with self._lock:
            unfinished = self._count_unfinished(last)

            if not unfinished:
                return 0

            waiter = _Waiter(last, unfinished, helps)
            self._waiters.append(waiter)

        limit = -1 if timeout is None else min(max(0, timeout), threading.TIMEOUT_MAX)

        try:
            return self._sleep(waiter, limit)
        finally:
            if not self._process.forked:
                with self._lock:
                    self._waiters.remove(waiter)

    def _sleep(self, waiter: _Waiter, limit: float) -> int:
        """Sleep and help by turns, and return how many are not done."""
        while True:
            if waiter.helps:
                with self._lock:
                    job = self._take(waiter.last)

                self._run(job, "helped", waiter.last)

                if self._process.forked:
                    return 0

            waiter.sleep(limit)

            # Who sets it to 0 does so before waking this thread.
            if not (waiter.helps and waiter.remaining):
                return waiter.remaining

    def _count_unfinished(self, last: int) -> int:
        """Count the jobs up to an index that are not done. Needs the lock."""
        if last == self._submitted:
            return self._unfinished

        return sum(job.index <= last for job in (*self._queue, *self._running))

    def _run(self, job: Job[t.Any] | None, how: How, last: float) -> None:
        """Run a job that was taken, and those after it up to an index."""
        while job is not None:
            job.run(how, self._binding)
            job = self._finish(job, last)

    def _may_summon(self) -> bool:
        """Note that a thread is summoned for what is queued, if one may come now.

        Needs the lock.
        """
        if self._summoned or len(self._running) >= self._max_workers:
            return False

        self._summoned = True
        return True

    def _take(self, last: float) -> Job[t.Any] | None:
        """Move the first queued job to the running ones. Needs the lock."""
        queue, running = self._queue, self._running

        if not queue or len(running) >= self._max_workers or queue[0].index > last:
            return None

        job = queue.popleft()
        job.thread = threading.get_ident()
        running.add(job)
        return job

    def _finish(self, job: Job[t.Any], last: float) -> Job[t.Any] | None:
        """Give back the slot of a job that is done; take the next up to an index."""
        if self._process.forked:
            # The job has forked. What else there is to do is its parent's.
            return None

        with self._lock:
            self._running.remove(job)
            self._unfinished -= 1

            for waiter in self._waiters:
                if job.index <= waiter.last:
                    waiter.remaining -= 1

                    if not waiter.remaining:
                        waiter.wake()

            if not self._queue:
                return None

            following = self._take(last)

            if following is not None:
                return following

            self._wake_helper()
            summon = self._may_summon()

        if summon:
            self._threads.summon(self)

        return None

    def _wake_helper(self) -> None:
        """Wake a thread that may take the first queued job. Needs the lock."""
        for waiter in self._waiters:
            if waiter.helps and self._queue[0].index <= waiter.last:
                waiter.wake()
                break

    def _cancel_queued(self) -> list[str]:
        """Cancel what no thread has begun, and return the names."""
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
            # Theirs is this thread now, so that they count until they are done.
            self._running.update(queued)

        names = [task_name(job.task) for job in queued if not job.future.cancelled()]

        for job in queued:
            job.future.cancel()
            job.run("inline", self._binding)
            self._finish(job, 0)

        return names

    def _give_up(self, timeout: float) -> Overdue | None:
        """Cancel what is queued, and have others in place of the threads that run."""
        cancelled = self._cancel_queued()

        with self._lock:
            running = list(self._running)

        frames = sys._current_frames()

        try:
            stuck = [found for job in running if (found := job.describe(frames))]
        finally:
            # This frame is one of them: no cycle through it.
            del frames

        held = self._threads.replace(self)
        left = cancelled or stuck
        return Overdue(timeout, cancelled, stuck, held) if left else None

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
