from __future__ import annotations

import contextvars
import threading
import typing as t

if t.TYPE_CHECKING:
    import weakref

    from .pool import ThreadPool
    from .queue import TaskQueue


class Worker:
    """A thread of a pool, which works and sleeps in turns.

    :param extra: It is beyond the pool's size, for a scope that is waited for.
    """

    __slots__ = ("awake", "extra", "ident", "scope")

    def __init__(self, extra: bool = False) -> None:
        # The worker sleeps by acquiring this lock once more, and is woken by a release:
        # for the first time when its start has succeeded.
        self.awake: threading.Lock = threading.Lock()
        self.awake.acquire()
        self.extra: bool = extra
        # What it serves.
        self.scope: TaskQueue | None = None
        # The identifier of its thread, which sets it.
        self.ident: int = 0

    def start(self, name: str, pool: weakref.ref[ThreadPool]) -> None:
        """Start the thread.

        :raises RuntimeError: The system gives none.
        """
        thread = threading.Thread(
            target=self._run, args=(pool,), name=name, daemon=True
        )
        # In an empty context: else it may keep the request that starts it, for good.
        contextvars.Context().run(thread.start)

    def _run(self, reference: weakref.ref[ThreadPool]) -> None:
        self.ident = threading.get_ident()

        while True:
            self.awake.acquire()
            # While it sleeps, it does not keep the pool alive.
            pool = reference()

            if pool is None or not pool.work(self):
                break

            del pool
