from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import math
import typing as t
import weakref

from flask import current_app

from ..api import current_scope
from ..api import find_holder
from ..api import run
from ..api import warn_without_apitask
from ..config import is_true
from ..config import refuse
from ..exceptions import DeliveryError
from ..executor.task import task
from ..executor.worker import threads_enabled
from ..log import find_logger
from ..log import log
from ..on_success import run_on_success
from .connection import OPENING
from .outbox import Outbox
from .pool import find_pool
from .settings import read_settings

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from ..calling import HandsOver
    from ..config import Config
    from ..executor.future import TaskFuture
    from .delivery import PooledConnection
    from .envelope import Envelope
    from .envelope import SMTPSettings
    from .pool import ConnectionPool
    from .pool import Pools

    # A function to call once a message is delivered, and the messages to deliver.
    Then: t.TypeAlias = cabc.Callable[[], object] | None
    Batch: t.TypeAlias = collections.deque[tuple[Envelope, Then]]
    Delivery: t.TypeAlias = TaskFuture[DeliveryError | None] | None
    Deliver: t.TypeAlias = cabc.Callable[
        [ConnectionPool, Batch, Delivery, bool], DeliveryError | None
    ]

# A block with this many bytes of rendered messages begins to deliver while it is open.
BATCH = 4 * 1024 * 1024
# The names of the libraries' objects in app.extensions, by the name of the task that
# delivers their mail.
EXTENSIONS: t.Final = {"flask_mail.send": "mail", "flask_mailman.send": "mailman"}
# The settings that these objects may have.
_SETTINGS = (
    *("server", "port", "use_tls", "use_ssl", "username", "password"),
    *("max_emails", "debug", "timeout", "ssl_certfile", "ssl_keyfile"),
)


class ReroutedMail:
    """How the mail of one app is sent: its configuration and connections."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # These find the scope of a message, and start its delivery.
        on_success = config.mail_start == "success"
        self.find_scope = find_holder if on_success else current_scope
        self.start = run_on_success if on_success else run
        self.on_success: bool = on_success
        self.outbox = Outbox(on_success)
        # A pool lives while it is in use or has idle connections. So the settings of a
        # tenant who sends no more mail don't stay around.
        self._pools: Pools = weakref.WeakValueDictionary()
        # Finds the task that hands a library's mail over to Celery, if it goes there.
        self.find_handover: cabc.Callable[[str], HandsOver | None] = lambda name: None

    def settings(self, mail: t.Any) -> SMTPSettings:
        """Return a mail library's current settings.

        :param mail: The library's object in ``app.extensions``, or any object with the
            same attributes.
        :raises ValueError: A value is not allowed.
        """
        names = (name for name in _SETTINGS if hasattr(mail, name))
        keys = {f"MAIL_{name.upper()}": getattr(mail, name) for name in names}
        return read_settings(keys, self.config)

    def pool(self, mail: t.Any) -> ConnectionPool:
        """Return the pool for a mail library's current settings.

        :raises ValueError: The settings can't be used, or a file can't be read.
        """
        config = self.config

        if not mail.server:
            # Not checked at start-up, because an app that sends no mail needs no
            # server.
            raise refuse("MAIL_SERVER", mail.server, "the name of a mail server")

        settings = self.settings(mail)
        settings.tls_context()
        return find_pool(
            self._pools,
            settings,
            size=config.mail_connections,
            # Don't keep connections if no thread could close them in time.
            keepalive=config.mail_keepalive if threads_enabled() else 0,
            owner=self,
        )


def find_rerouted(app: Flask) -> ReroutedMail | None:
    """Return how an app's mail is rerouted; ``None`` if it is not."""
    rerouted: ReroutedMail | None = app.extensions.get("apitask_mail")

    if rerouted is None and is_true(app.config.get("APITASK_MAIL_BACKGROUND")):
        warn_without_apitask(app, "A mail was sent")

    return rerouted


class MailBlock:
    """Messages that are sent over one connection, in order.

    In a scope, they are collected, and one task delivers them at the end of the block.
    If they come to some megabytes, further tasks deliver them earlier, one after the
    other, unless mail waits for the success of the request. Without a scope, each
    message is delivered at once. Where mail goes to Celery, the task hands it over,
    with a scope or without.

    :param name: The name of the task, a key of :data:`deliveries`.
    :param mail: The object that has the settings, as for :meth:`ReroutedMail.pool`.
    :param fail_silently: Log errors at INFO instead of raising them.
    :param ends: The block is sure to end. If it is not, nothing is collected: each
        message gets a task.
    """

    def __init__(
        self,
        rerouted: ReroutedMail,
        name: str,
        mail: t.Any,
        *,
        fail_silently: bool = False,
        ends: bool = True,
    ) -> None:
        self._rerouted = rerouted
        self._pool = rerouted.pool(mail)
        self._fail_silently = fail_silently
        handover = rerouted.find_handover(name)
        self._deliver: Deliver = handover or deliveries[name]
        self._is_in_scope = rerouted.find_scope() is not None
        # The connection for all messages, without a scope.
        is_kept = self._is_in_scope or handover
        self._connection = None if is_kept else self._pool.connection()
        self._batch: Batch = collections.deque()
        self._size = 0
        at_once = not (ends and self._is_in_scope)
        self._limit = 0.0 if at_once else math.inf if rerouted.on_success else BATCH
        self._delivery: Delivery = None

    def send(self, envelope: Envelope, then: Then = None) -> bool:
        """Deliver a message, or let a task do so.

        :param then: What to call once it is delivered.
        :return: ``False`` if the delivery has failed, and ``fail_silently`` is on.
        :raises DeliveryError: Only without a scope: the message was not delivered.
        """
        self._batch.append((envelope, then))
        self._size += len(envelope.content)

        if self._connection is not None:
            for error in _deliver_all(self._connection, self._batch):
                if not self._fail_silently:
                    raise error

                log_silenced(error)
                return False
        elif self._size >= self._limit:
            self._begin_delivery()
            # Without a scope, it is done by now.
            return self._is_in_scope or _find_error(self._delivery) is None

        return True

    def end(self) -> None:
        """Let a task deliver the remaining messages."""
        if self._connection is not None:
            self._connection.close()
        elif self._batch:
            self._begin_delivery()

    def _begin_delivery(self) -> None:
        """Let a task deliver the batch, once the one before is done."""
        if not self._rerouted.on_success:
            # Wait for the previous batch, so that memory holds few messages at a time.
            _find_error(self._delivery)

        self._delivery = self._rerouted.start(
            self._deliver, self._pool, self._batch, self._delivery, self._fail_silently
        )
        self._batch, self._size = collections.deque(), 0


def _make_delivery(name: str) -> Deliver:
    @task(name)
    def deliver(
        pool: ConnectionPool, batch: Batch, before: Delivery, fail_silently: bool
    ) -> DeliveryError | None:
        """Deliver messages in order.

        :param fail_silently: Log an error at INFO and return it instead of raising it.
        :raises DeliveryError: Some were not delivered; the message says which, and why.
        """
        if error := _deliver(pool, batch, before):
            if not fail_silently:
                raise error

            log_silenced(error)

        return error

    # At exit, the process waits for a delivery, which the connection's timeouts limit.
    deliver.exit_grace = None  # type: ignore[attr-defined]
    return deliver


# The tasks that deliver mail, by name.
deliveries: t.Final = {name: _make_delivery(name) for name in EXTENSIONS}


def log_silenced(error: DeliveryError) -> None:
    """Log an INFO about a message that was not delivered."""
    # Without the error itself, whose traceback would keep the request's objects alive.
    text = "A mail was not delivered (fail_silently is on): %s"
    log(find_logger(current_app), logging.INFO, text, str(error))


def _deliver(
    pool: ConnectionPool, batch: Batch, before: Delivery
) -> DeliveryError | None:
    """Deliver messages in order, and return an error that says which failed, and why.

    A message that is refused does not stop the others. A server that can't be reached
    does: waiting for it again for each message would hold up the request for minutes.

    :param before: The delivery of the previous batch, to wait for first.
    """
    give_up = _is_unreachable(_find_error(before))
    count = len(batch)

    with pool.connection() as connection:
        failures = _deliver_all(connection, batch, give_up)

    return join_failures(failures, count)


def join_failures(failures: list[DeliveryError], count: int) -> DeliveryError | None:
    """Return one error for those of a batch, if there are any.

    :param count: How many messages there were.
    """
    if len(failures) < 2:
        return failures[0] if failures else None

    causes = "\n".join(f"- {error}" for error in failures)
    return DeliveryError(
        f"{len(failures)} of {count} messages were not delivered:\n{causes}",
        recipients={
            recipient: reply
            for error in failures
            for recipient, reply in error.recipients.items()
        },
        failures=tuple(failures),
    )


def _deliver_all(
    connection: PooledConnection, batch: Batch, give_up: bool = False
) -> list[DeliveryError]:
    """Deliver a batch, announce the delivered messages, and return the errors."""
    told: list[cabc.Callable[[], object]] = []
    failures: list[DeliveryError] = []

    while batch:
        envelope, then = batch.popleft()

        try:
            if give_up:
                raise DeliveryError("It was not attempted.")

            connection.send(envelope)

            if then is not None:
                told.append(then)
        except DeliveryError as error:
            error.message_id = envelope.message_id
            give_up = _is_unreachable(error)
            # Tracebacks through our own code would not help readers of the log, and
            # hold the whole message for as long as the error exists.
            error.__context__ = None
            failures.append(error.with_traceback(None))

    if told:
        # A receiver may send mail, and must not wait for the connection used here.
        connection.close()

    for then in told:
        then()

    return failures


def _find_error(delivery: Delivery) -> BaseException | None:
    """Wait for a delivery, and return its error, if any."""
    # A delivery in an outer scope may be deferred until that scope's success.
    if delivery is not None and not delivery.held:
        # The delivery is cancelled if the request's deadline has passed.
        with contextlib.suppress(concurrent.futures.CancelledError):
            return delivery.exception() or delivery.result()

    return None


def _is_unreachable(error: BaseException | None) -> bool:
    """Tell whether the last message failed because the server let nobody in."""
    last = getattr(error, "failures", ())[-1:] or (error,)
    return isinstance(last[0], DeliveryError) and last[0].stage in OPENING | {None}
