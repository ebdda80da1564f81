from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import typing as t
import weakref
from collections import deque

if t.TYPE_CHECKING:
    import collections.abc as cabc

How = t.Literal["thread", "helped", "inline"]

# Stands for the process that this module runs in. A forked child has another one.
_process = object()
_all: weakref.WeakSet[Threads] = weakref.WeakSet()


def this_process() -> object:
    """Return what stands for this process, and for none of its forked children."""
    return _process


class Servable(t.Protocol):
    """What has work for a thread: a scope."""

    def serve(self, how: How) -> None:
        """Do all the work there is."""


class Threads:
    """Lend the threads of one stdlib thread pool to any number of scopes.

    To wake a thread costs more than to run a small task. So at most one is on its way
    at any time. It takes the first scope that waits for one, sends for the next thread
    if more wait, serves the scope, and looks for another one before it goes.

    Guarantee: a scope that was added is served after that, unless it is dismissed.

    What could break it, and what prevents it:

    1.  *Lost scope.* The last thread finds none that waits and goes, one is added, and
        nobody is sent for. So who adds looks for ``_coming`` in the same step, under
        the lock, and who arrives clears it before it looks for a scope.
    2.  *Nobody comes.* The pool refuses: the interpreter shuts down, or the system has
        no thread left. Others may have relied on the one who is refused. So that one
        serves all that wait, on the spot.
    3.  *A pool that refuses and keeps.* The stdlib's may raise after it has queued the
        call. A thread that comes all the same finds nothing, or serves what there is.
    4.  *Fork.* The child has none of these threads, and a lock that nobody there may
        ever release. So all begin anew in it, before it does anything else.

    :param size: Most threads. The pool starts them on demand.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.begin()
        _all.add(self)

    def begin(self) -> None:
        """Forget all threads and calls. Nobody else may use this object meanwhile."""
        self._pool = concurrent.futures.ThreadPoolExecutor(self._size, "apitask")
        # Guards the two below.
        self._lock = threading.Lock()
        self._waiting: deque[Servable] = deque()
        self._coming = False

    def summon(self, scope: Servable) -> None:
        """Have a thread serve a scope, or do it here if none can be had."""
        if not self.add(scope):
            self._serve("inline")

    def add(self, scope: Servable) -> bool:
        """Have a thread serve a scope after those that wait already.

        :return: Whether somebody comes.
        """
        with self._lock:
            self._waiting.append(scope)

            if self._coming:
                return True

            self._coming = True

        return self._send()

    def dismiss(self, scope: Servable) -> None:
        """Have no thread serve a scope any more, so that nothing here refers to it."""
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(scope)

    def submit(self, fn: cabc.Callable[[], object], /) -> None:
        """Call ``fn`` on a thread of the pool.

        :raises RuntimeError: None can be had.
        """
        self._pool.submit(fn)

    def _send(self) -> bool:
        try:
            self.submit(self._arrive)
        except BaseException as error:
            # Whatever it was: nobody must rely on a thread that does not come.
            with self._lock:
                self._coming = False

            if not isinstance(error, RuntimeError):
                raise

            return False

        return True

    def _arrive(self) -> None:
        with self._lock:
            self._coming = False

        self._serve("thread")

    def _serve(self, how: How) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return

                scope = self._waiting.popleft()
                send = bool(self._waiting) and not self._coming and how == "thread"
                self._coming = self._coming or send

            if send:
                self._send()

            scope.serve(how)


def _after_fork() -> None:
    global _process
    _process = object()

    for threads in _all:
        threads.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
