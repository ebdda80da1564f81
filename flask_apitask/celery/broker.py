from __future__ import annotations

import logging
import threading
import time
import typing as t

from celery.utils import uuid

from ..log import log

if t.TYPE_CHECKING:
    import celery
    import celery.result

# Seconds after which a broker that was down is tried again, by one task.
_LOOK_EVERY: t.Final = 5.0


class Broker:
    """What publishes for a Celery app in one process, and knows if the broker is down.

    Each publication takes a connection from a pool of Kombu's. The pool is not the one
    of Celery itself: with ours, a broker confirms each message (publisher confirms on
    RabbitMQ; a reply is one on Redis), and each operation has a timeout.

    A child of a fork makes a new one, and leaves the connections of its parent alone.

    What could break it, and what prevents it:

    1.  *A herd.* All threads try a broker that is down, each for the whole timeout. So
        the time of the next look is moved under the lock, by the one thread that takes
        that look; others see the new time, and do not try.
    2.  *Many warnings.* Several threads fail at once. So the first one to set that time
        under the lock is the one to warn.

    :param timeout: Seconds that a publication may take.
    """

    def __init__(self, celery_app: celery.Celery, timeout: float) -> None:
        self._timeout = timeout
        # What fails at once is tried once more, so that each try has half of it.
        step = timeout / 2
        options = {
            **celery_app.conf.broker_transport_options,
            # RabbitMQ; Redis.
            **{"confirm_publish": True, "read_timeout": step, "write_timeout": step},
            **{"socket_timeout": step, "socket_connect_timeout": step},
            "max_retries": 0,
        }
        connection = celery_app.connection_for_write(
            connect_timeout=step, transport_options=options
        )
        self._connections = connection.Pool(limit=celery_app.conf.broker_pool_limit)
        # Guards the next one. Never held while something is published or logged.
        self._lock = threading.Lock()
        # When to try a broker that is down, by the monotonic clock; None if it is up.
        self._look_at: float | None = None

    def publish(
        self,
        logger: logging.Logger,
        task: celery.Task,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        **options: t.Any,
    ) -> celery.result.AsyncResult | None:
        """Publish a task; ``None`` if the broker did not confirm it.

        It may have come through in that case too: only the confirmation is missing.

        :param logger: Is told when the broker goes down, and when it is back.
        :param options: For :meth:`celery.app.task.Task.apply_async`.
        """
        if not self._may_try():
            return None

        try:
            result = self._publish(task, args, kwargs, options)
        except Exception as error:
            self._note_failure(logger, error)
            return None

        self._note_success(logger)
        return result

    def close(self) -> None:
        """Close the connections. Nothing can be published any more."""
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
                "The broker of Celery did not confirm a task within %s s"
                " (APITASK_CELERY_TIMEOUT): %s. Until it is back, tasks that are routed"
                " to Celery run in their requests; it is tried again every %s s."
            )
            cause = type(error).__name__
            log(logger, logging.WARNING, text, self._timeout, cause, _LOOK_EVERY)
            log(logger, logging.DEBUG, "What the broker said.", error=error)

    def _note_success(self, logger: logging.Logger) -> None:
        with self._lock:
            was_down, self._look_at = self._look_at is not None, None

        if was_down:
            log(logger, logging.INFO, "The broker of Celery is back.")

    def _publish(
        self,
        task: celery.Task,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
        options: dict[str, t.Any],
    ) -> celery.result.AsyncResult:
        step = self._timeout / 2
        # One identifier, if it has to be published twice.
        options.setdefault("task_id", uuid())
        options |= {"serializer": "json", "retry": False, "confirm_timeout": step}
        # Without this, the backend of results would be talked to first, with no timeout
        # of ours. AsyncResult.get() does it, too. The header is what the worker obeys.
        options["ignore_result"] = True
        options["headers"] = {"ignore_result": task.ignore_result}
        began = time.monotonic()

        with self._connections.acquire(block=True, timeout=step) as connection:
            was_kept = connection.connected
            options["connection"] = connection

            try:
                result = task.apply_async(args, kwargs, **options)
            except Exception:
                connection.collect()

                # One that was kept may be dead though the broker is not.
                if not was_kept or time.monotonic() - began > step / 2:
                    raise

                try:
                    result = task.apply_async(args, kwargs, **options)
                except Exception:
                    connection.collect()
                    raise

        return task.AsyncResult(result.id)
