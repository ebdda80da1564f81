from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import typing as t

from celery.utils import uuid
from kombu.messaging import Producer

from ..executor.pool import ThreadPool
from ..executor.runner import Runner
from ..executor.scope import TaskScope
from ..log import log

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import celery
    import celery.result

    from ..executor.runner import TimeoutReport

# Seconds after which one task tries a broker that was down again.
_LOOK_EVERY: t.Final = 5.0
# The most connections if Celery's broker_pool_limit sets no limit.
_CONNECTIONS: t.Final = 10


class Broker:
    """Publishes for a Celery app in one process, and knows if its broker is down.

    Each message is published over a connection from a Kombu pool. It is not Celery's
    own pool: here, the broker confirms each message (with publisher confirms on
    RabbitMQ; on Redis, every reply is a confirmation), and each socket operation has a
    timeout.

    That is enough for a kept connection, which needs one reply. A new one needs a
    dozen, so it is used on another thread, which is left behind when the time is up.
    The connection keeps its place in the Kombu pool until that thread ends. So no more
    threads are left behind than that pool allows.

    A forked child makes a broker of its own, and leaves its parent's connections alone.

    What could break it, and what prevents it:

    1.  *A herd.* All threads try a broker that is down, each for the whole timeout. So
        the one thread that tries it next moves the time of the following try, under the
        lock; the others see the new time and don't try.
    2.  *Many warnings.* Several threads fail at once. So only the first one to set that
        time, under the lock, warns.

    :param timeout: Seconds that a publication may take.
    """

    def __init__(self, celery_app: celery.Celery, timeout: float) -> None:
        self._timeout = timeout
        limit = celery_app.conf.broker_pool_limit or _CONNECTIONS
        # Those other threads. They take none of the app's tasks.
        self._threads = _Threads(limit)
        # A try that fails at once is repeated once, so each one has half the time.
        step = timeout / 2
        options = {
            **celery_app.conf.broker_transport_options,
            # These are for RabbitMQ, and the next line is for Redis.
            **{"confirm_publish": True, "read_timeout": step, "write_timeout": step},
            **{"socket_timeout": step, "socket_connect_timeout": step},
            "max_retries": 0,
        }
        connection = celery_app.connection_for_write(
            connect_timeout=step, transport_options=options
        )
        self._connections = connection.Pool(limit=limit)
        # Guards the time below. Never held while publishing or logging.
        self._lock = threading.Lock()
        # When to try the broker again, by the monotonic clock; None while it is up.
        self._look_at: float | None = None

    def publish(
        self,
        logger: logging.Logger,
        task: celery.Task,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        **options: t.Any,
    ) -> celery.result.AsyncResult | None:
        """Publish a task. Return ``None`` if the broker did not confirm it.

        Even then it may have arrived: only the confirmation is missing.

        :param logger: For a record when the broker goes down, and when it is back.
        :param options: For :meth:`celery.app.task.Task.apply_async`.
        """
        if not self._may_try():
            return None

        try:
            self._publish(task, args, kwargs, options)
        except Exception as error:
            self._note_failure(logger, error)
            return None

        self._note_success(logger)
        return task.AsyncResult(options["task_id"])

    def close(self) -> None:
        """Close the connections. Nothing can be published after that."""
        self._connections.force_close_all()

    def _may_try(self) -> bool:
        now = time.monotonic()

        with self._lock:
            if self._look_at is not None:
                if now < self._look_at:
                    return False

                self._look_at = now + self._timeout + _LOOK_EVERY

        return True

    def _note_failure(self, logger: logging.Logger, error: Exception) -> None:
        with self._lock:
            is_known = self._look_at is not None
            self._look_at = time.monotonic() + _LOOK_EVERY

        if not is_known:
            text = (
                "Celery's broker did not confirm a task within %s s"
                " (APITASK_CELERY_TIMEOUT): %s. Until it is back, tasks routed to"
                " Celery run in their requests. The broker is tried again every %s s."
            )
            cause = type(error).__name__
            log(logger, logging.WARNING, text, self._timeout, cause, _LOOK_EVERY)
            log(logger, logging.DEBUG, "The broker's error:", error=error)

    def _note_success(self, logger: logging.Logger) -> None:
        with self._lock:
            was_down, self._look_at = self._look_at is not None, None

        if was_down:
            log(logger, logging.INFO, "Celery's broker is back.")

    def _publish(
        self,
        task: celery.Task,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        options: dict[str, t.Any],
    ) -> None:
        began, step = time.monotonic(), self._timeout / 2
        # The same identifier, even if the task has to be published twice.
        options.setdefault("task_id", uuid())
        options |= {"serializer": "json", "retry": False, "confirm_timeout": step}
        # Without this, Celery would first talk to the result backend, without our
        # timeout. AsyncResult.get() talks to it later anyway. The worker obeys the
        # header.
        options["ignore_result"] = True
        options["headers"] = {"ignore_result": task.ignore_result}

        with contextlib.ExitStack() as stack:
            acquired: t.Any = self._connections.acquire(block=True, timeout=step)
            connection = stack.enter_context(acquired)
            publish = functools.partial(task.apply_async, args, kwargs, **options)

            if connection.connected:
                try:
                    publish(connection=connection)
                    return
                except Exception:
                    connection.collect()

                    # A kept connection may be dead although the broker is up.
                    if time.monotonic() - began > step / 2:
                        raise

            given_back, ends_at = stack.pop_all(), began + self._timeout
            _publish_in_time(self._threads, given_back, connection, publish, ends_at)


def _publish_in_time(
    threads: ThreadPool,
    stack: contextlib.ExitStack,
    connection: t.Any,
    publish: cabc.Callable[..., object],
    ends_at: float,
) -> None:
    """Publish over a new connection, on another thread.

    :param stack: Gives the connection back to its pool.
    :param ends_at: By the monotonic clock.
    :raises Exception: Publishing failed, or was not done in time.
    """
    # Whoever takes it off gives the connection back: that thread, or this one.
    held = [stack]

    try:
        with contextlib.ExitStack() as ended:
            scope = TaskScope(threads, 1, ends_at - time.monotonic(), _Publisher())
            # After an interrupt. Otherwise it has ended by then.
            ended.callback(scope.shutdown, wait=False, cancel_futures=True)
            future = scope.submit(_use, held, connection, publish, ends_at)
            scope.end()
    finally:
        with contextlib.suppress(IndexError):
            held.pop().close()

    try:
        future.result(0)
    finally:
        # The traceback of an error refers to this frame: avoid a reference cycle.
        del future


def _use(
    held: list[contextlib.ExitStack],
    connection: t.Any,
    publish: cabc.Callable[..., object],
    ends_at: float,
) -> None:
    with held.pop():
        try:
            publish(producer=_PunctualProducer(connection, ends_at))
        except Exception:
            connection.collect()
            raise


class _PunctualProducer(Producer):
    """Opens a connection, and publishes nothing if that takes too long.

    By then the task has run in its request, and must not run in a worker too.

    :param ends_at: By the monotonic clock.
    :raises TimeoutError: That is over.
    """

    def __init__(self, connection: t.Any, ends_at: float) -> None:
        self._ends_at = ends_at
        super().__init__(  # type: ignore[no-untyped-call]
            connection.default_channel, auto_declare=False
        )
        self._check_time()

    def maybe_declare(self, *args: t.Any, **options: t.Any) -> object:
        """Declare a queue, just before something is published there."""
        is_new: object = super().maybe_declare(  # type: ignore[no-untyped-call]
            *args, **options
        )
        self._check_time()
        return is_new

    def _check_time(self) -> None:
        if time.monotonic() > self._ends_at:
            raise TimeoutError


class _Threads(ThreadPool):
    """Threads that the process's exit neither waits for nor reports."""

    def close(self, started: float) -> None:
        """Do nothing: the exit waits for their callers, who need no more than that."""


class _Publisher(Runner):
    """Reports no thread that is left behind, as the task then runs in its request."""

    def report(self, report: TimeoutReport) -> None:
        pass
