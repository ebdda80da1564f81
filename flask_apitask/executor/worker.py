from __future__ import annotations

import contextvars
import sys
import threading
import typing as t

if t.TYPE_CHECKING:
    import weakref

    from .pool import ThreadPool
    from .queue import TaskQueue


class Worker:
    """A thread of a pool, which alternates between working and sleeping.

    :param extra: Whether it exceeds the pool's size, for a scope with a waiting thread.
    """

    __slots__ = ("awake", "extra", "ident", "scope")

    def __init__(self, extra: bool = False) -> None:
        # The worker sleeps by acquiring this lock again, and a release wakes it. The
        # first release comes once its start has succeeded.
        self.awake: threading.Lock = threading.Lock()
        self.awake.acquire()
        self.extra: bool = extra
        # The scope that it serves.
        self.scope: TaskQueue | None = None
        # The identifier of its thread, set by the thread itself.
        self.ident: int = 0

    def start(self, name: str, pool: weakref.ref[ThreadPool]) -> None:
        """Start the thread.

        :raises RuntimeError: The system can't start one.
        """
        thread = threading.Thread(
            target=self._run, args=(pool,), name=name, daemon=True
        )
        # In an empty context, so that it doesn't keep alive the request that starts it.
        contextvars.Context().run(thread.start)

    def _run(self, reference: weakref.ref[ThreadPool]) -> None:
        self.ident = threading.get_ident()

        while True:
            self.awake.acquire()
            # Only a weak reference while asleep, so that it does not keep the pool
            # alive.
            pool = reference()

            if pool is None or not pool.work(self):
                break

            del pool


def threads_enabled() -> bool:
    """Return whether threads of this process run while no request is being served.

    Before 2.0.27, uWSGI holds Python's global lock between requests unless told
    otherwise, so threads freeze in mid-work until the next request comes.
    """
    # uWSGI puts this module into sys.modules itself; it can't be imported.
    return getattr(sys.modules.get("uwsgi"), "has_threads", True)
