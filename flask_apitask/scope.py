from __future__ import annotations

import concurrent.futures
import os
import sys
import threading
import traceback
import typing as t
import warnings
from collections import deque

from .exceptions import ScopeClosed
from .tasks import check_task
from .tasks import How
from .tasks import Job
from .tasks import task_name

if t.TYPE_CHECKING:
    import collections.abc as cabc
    from types import FrameType

P = t.ParamSpec("P")
T = t.TypeVar("T")

Binder: t.TypeAlias = (
    "cabc.Callable[[t.Any, tuple[t.Any, ...], dict[str, t.Any]], Job[t.Any]]"
)

# The process that this module runs in. A scope that a forked child has from its parent
# has another one: its threads are not there, and its lock may be held by one of them.
_process = object()

# Later than the index of any piece of work.
_EVER = float("inf")

_NO_STACK = "  (no stack: it is just beginning, or runs on no thread of the system)\n"


class Threads:
    """Lend the threads of one stdlib thread pool to any number of scopes.

    The pool is made at the first call, and made anew in a forked child, which has none
    of its parent's threads.

    :param size: Most threads of the process. The pool starts them on demand.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._process: object = None
        self._pool: concurrent.futures.ThreadPoolExecutor

    def submit(self, fn: cabc.Callable[..., object], /, *args: t.Any) -> None:
        """Call ``fn`` on one of the threads, some time.

        :raises RuntimeError: No thread can be had: the interpreter shuts down, or the
            system refuses to start one more.
        """
        if self._process is not _process:
            # Two threads that come here at once make two pools. Both work, and the
            # threads of the one that is forgotten end with their last call.
            self._pool = concurrent.futures.ThreadPoolExecutor(self._size, "apitask")
            self._process = _process

        self._pool.submit(fn, *args)


class Overdue(t.NamedTuple):
    """What a scope left behind when it ended at its deadline.

    :param timeout: Seconds that it waited.
    :param cancelled: The names of tasks that no thread had begun. They never run.
    :param running: The names of tasks that still run, each with the stack, as text,
        that its thread was in.
    """

    timeout: float
    cancelled: list[str]
    running: list[tuple[str, str]]


class _Work:
    """A job in the queue of a scope, and the future of its result."""

    __slots__ = ("future", "index", "job", "thread")

    def __init__(
        self, job: Job[t.Any], future: concurrent.futures.Future[t.Any], index: int
    ) -> None:
        self.job = job
        self.future = future
        self.index = index
        self.thread = 0

    def run(self, how: How) -> None:
        """Run the job, unless its future is cancelled.

        Who waits may go on as soon as the scope counts the work as done. By then
        nothing here refers to the job, its arguments or its outcome any more.
        """
        future = self.future
        del self.future
        self.thread = threading.get_ident()

        if not future.set_running_or_notify_cancel():
            del self.job
            return

        try:
            result = self.job(how)
        except BaseException as error:
            del self.job
            future.set_exception(error)
            # The traceback refers to this frame: no cycle from it to the exception.
            del future
        else:
            del self.job
            future.set_result(result)

    def describe(self, frames: cabc.Mapping[int, FrameType]) -> tuple[str, str] | None:
        """Return the job's name and its stack in a snapshot, unless it is done."""
        frame = frames.get(self.thread)
        stack = "".join(traceback.format_stack(frame)) if frame else _NO_STACK
        job = getattr(self, "job", None)
        return None if job is None else (job.name, stack)


class _Waiter:
    """A thread that waits until the tasks up to an index are done.

    Both counts are guarded by the scope's lock; ``done`` is released at zero.
    """

    __slots__ = ("done", "last", "remaining")

    def __init__(self, last: int, remaining: int) -> None:
        self.last = last
        self.remaining = remaining
        self.done = threading.Lock()
        self.done.acquire()


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

    Assumption: what a job calls does not wait for a later job of the same scope.

    What could break it, and what prevents it:

    1.  *Lost wake-up.* A thread finds the cap reached and leaves; the one that runs
        finishes and leaves as well; the queue is not empty and nobody comes. So a slot
        is given back, and the next piece taken or a thread summoned for it, in one step
        under the lock (``_finish``), never in two.
    2.  *Late submit.* A task is submitted between the last look at the queue and the
        end. So ``_closed`` is set before the wait, and read by ``submit``, under the
        same lock.
    3.  *Summoned for nothing.* The helper takes the work before the summoned thread
        arrives. That thread finds nothing it may take and goes home; what is capped is
        ``_running``, not the number of threads on their way.
    4.  *Nobody can be summoned.* At interpreter shutdown the pool refuses. Who submits
        then serves the queue itself, at once, under the same cap. A summoned thread
        does not: it is about to run an earlier piece, and serves the queue after it.
    5.  *Fork.* The child has a copy of the scope, with a lock that nobody may ever give
        back and tasks that run in the parent. So it is closed there, and nobody waits
        for it: that is read from ``_process`` before the lock is touched.

    :param threads: Where the threads come from.
    :param max_workers: Most tasks that run at once.
    :param timeout: Seconds that :meth:`end` waits, ``None`` for as long as it takes.
    :param bind: Makes the job of a task and its arguments, in the submitting thread.
    """

    def __init__(
        self,
        threads: Threads,
        *,
        max_workers: int,
        timeout: float | None = None,
        bind: Binder = Job,
    ) -> None:
        self._threads = threads
        self._max_workers = max_workers
        self._timeout = timeout
        self._bind = bind
        # Guards all below. Held for bookkeeping only: never while a task, a callback
        # of a future or the pool runs.
        self._lock = threading.Lock()
        self._queue: deque[_Work] = deque()
        self._running: set[_Work] = set()
        self._waiters: list[_Waiter] = []
        self._submitted = 0
        self._summoned = False
        self._closed = False
        self._process = _process

    @property
    def closed(self) -> bool:
        """Whether further tasks are refused. They are in a forked child, too."""
        return self._closed or self._process is not _process

    def submit(
        self, fn: cabc.Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Run a task on a thread of the pool, in the Flask context of the caller.

        :param fn: A callable. Every argument after it belongs to it.
        :raises TypeError: ``fn`` can't be called.
        :raises ScopeClosed: The scope has ended. :func:`.run` makes a plain call then.
        """
        check_task(fn)

        if self.closed:
            raise self._refusal(fn)

        job = self._bind(fn, args, kwargs)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        with self._lock:
            if self._closed:
                raise self._refusal(fn)

            self._submitted += 1
            self._queue.append(_Work(job, future, self._submitted))
            summon = self._may_summon()

        if summon and not self._summon():
            self._serve_inline()

        return future

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
        self._close()

        if cancel_futures:
            self._cancel_queued()

        if wait:
            self._join(None)

    def end(self) -> Overdue | None:
        """Refuse further tasks, and wait for those submitted until the deadline.

        :return: What was left behind at the deadline, or ``None`` if nothing was.
        """
        self._close()

        if not self._join(self._timeout) or self._timeout is None:
            return None

        overdue = Overdue(self._timeout, self._cancel_queued(), self._stuck())
        return overdue if overdue.cancelled or overdue.running else None

    def _close(self) -> None:
        if not self.closed:
            with self._lock:
                self._closed = True

    def _join(self, timeout: float | None) -> int:
        """Wait, and return how many of the tasks submitted so far are not done."""
        if self._process is not _process:
            return 0

        with self._lock:
            unfinished = len(self._queue) + len(self._running)

            if not unfinished:
                return 0

            waiter = _Waiter(self._submitted, unfinished)
            self._waiters.append(waiter)
            work = self._take(waiter.last) if timeout is None else None

        self._run(work, "helped", waiter.last)

        if timeout is None:
            waiter.done.acquire()
        else:
            waiter.done.acquire(timeout=min(max(timeout, 0), threading.TIMEOUT_MAX))

        with self._lock:
            self._waiters.remove(waiter)
            return waiter.remaining

    def _serve(self) -> None:
        """Run what is queued: what a summoned thread does.

        It summons the next one before it begins, so that threads come one by one for as
        long as there is work left for them, and not one for each task.
        """
        with self._lock:
            self._summoned = False
            work = self._take(_EVER)
            summon = self._may_summon()

        if summon:
            self._summon()

        self._run(work, "thread", _EVER)

    def _serve_inline(self) -> None:
        """Run what is queued on the caller's thread, as no other can be had."""
        with self._lock:
            work = self._take(_EVER)

        self._run(work, "inline", _EVER)

    def _run(self, work: _Work | None, how: How, last: float) -> None:
        while work is not None:
            work.run(how)
            work = self._finish(work, last)

    def _summon(self) -> bool:
        """Have a thread come and serve the queue, if one can be had."""
        try:
            self._threads.submit(self._serve)
        except RuntimeError:
            with self._lock:
                self._summoned = False

            return False

        return True

    def _may_summon(self) -> bool:
        """Note that a thread is summoned, if one is needed now. Needs the lock."""
        if self._summoned or not self._queue or self._is_full():
            return False

        self._summoned = True
        return True

    def _is_full(self) -> bool:
        return len(self._running) >= self._max_workers

    def _take(self, last: float) -> _Work | None:
        """Move the first piece of work to the running ones. Needs the lock."""
        if not self._queue or self._is_full():
            return None

        if self._queue[0].index > last:
            return None

        work = self._queue.popleft()
        self._running.add(work)
        return work

    def _finish(self, work: _Work, last: float) -> _Work | None:
        """Give the slot of a finished piece back, and take the next up to an index."""
        with self._lock:
            self._running.remove(work)

            for waiter in self._waiters:
                if work.index <= waiter.last:
                    waiter.remaining -= 1

                    if not waiter.remaining:
                        waiter.done.release()

            following = self._take(last)
            summon = following is None and self._may_summon()

        if summon and not self._summon():
            self._serve_inline()

        return following

    def _cancel_queued(self) -> list[str]:
        """Cancel what no thread has begun, and return the names."""
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
            # Theirs is this thread now, so that they count until they are done.
            self._running.update(queued)

        names = [work.job.name for work in queued if not work.future.cancelled()]

        for work in queued:
            work.future.cancel()
            work.run("inline")
            self._finish(work, 0)

        return names

    def _stuck(self) -> list[tuple[str, str]]:
        """Return the names and the stacks of the tasks that run."""
        with self._lock:
            running = list(self._running)

        frames = sys._current_frames()
        return [stuck for work in running if (stuck := work.describe(frames))]

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<{type(self).__name__} {state} queued={len(self._queue)}"
            f" running={len(self._running)} max_workers={self._max_workers}>"
        )

    def __del__(self) -> None:
        if self._submitted and not self.closed:
            warnings.warn(
                f"{self!r} was never ended. Use 'with open_scope()'.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


def _after_fork() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
