from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import math
import typing as t
import weakref

from ..api import current_scope
from ..api import find_holder
from ..api import run
from ..api import warn_without_apitask
from ..config import is_true
from ..config import refuse
from ..exceptions import DeliveryError
from ..executor.pool import threads_enabled
from ..on_success import run_on_success
from ..runner import HandsOver
from .announcing import Outbox
from .pool import find_pool
from .settings import read_settings
from .smtp import OPENING

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from ..config import Config
    from ..executor.future import TaskFuture
    from .delivery import PooledConnection
    from .envelope import Envelope
    from .pool import ConnectionPool
    from .pool import Pools

    # What to deliver, and what to call once it is.
    Then: t.TypeAlias = cabc.Callable[[], object] | None
    Batch: t.TypeAlias = collections.deque[tuple[Envelope, Then]]
    Delivery: t.TypeAlias = TaskFuture[DeliveryError | None] | None
    Deliver: t.TypeAlias = cabc.Callable[
        [ConnectionPool, Batch, Delivery], DeliveryError | None
    ]

# Bytes of rendered messages with which a block begins to deliver while it is open.
BATCH = 4 * 1024 * 1024


class ReroutedMail:
    """The way that the mail of one app takes: its configuration and its connections."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # What decides where a mail goes, and what starts its delivery.
        on_success = config.mail_start == "success"
        self.find_scope = find_holder if on_success else current_scope
        self.start = run_on_success if on_success else run
        self.on_success: bool = on_success
        self.outbox = Outbox(on_success)
        # A pool lives while it is in use or has something idle. So nothing is left of
        # the settings of a tenant that sends no more.
        self._pools: Pools = weakref.WeakValueDictionary()
        # Finds what hands the mail of Flask-Mail over to Celery, where it goes there.
        self.find_handover: cabc.Callable[[], HandsOver | None] = lambda: None

    def pool(self, keys: cabc.Mapping[str, t.Any]) -> ConnectionPool:
        """Return the pool for what a library says of its mail server by now.

        :param keys: As in the configuration of the app.
        :raises ValueError: The settings can't be used, or a file not be read.
        """
        config, server = self.config, keys["MAIL_SERVER"]

        if not server:
            # It is no mistake at start-up: an app that sends nothing needs none.
            raise refuse("MAIL_SERVER", server, "the name of a mail server")

        settings = read_settings(keys, config)
        settings.tls_context()
        return find_pool(
            self._pools,
            settings,
            size=config.mail_connections,
            # None is kept where no thread could close it in time.
            keepalive=config.mail_keepalive if threads_enabled() else 0,
            owner=self,
        )


def find_rerouted(app: Flask) -> ReroutedMail | None:
    """Return the way of an app's mail; ``None`` if its library is left as it is."""
    rerouted: ReroutedMail | None = app.extensions.get("apitask_mail")

    if rerouted is None and is_true(app.config.get("APITASK_MAIL_BACKGROUND")):
        warn_without_apitask(app, "A mail was sent")

    return rerouted


class MailBlock:
    """Messages that go over one connection, in order.

    In a scope they are collected, and delivered by one task at the end of the block;
    some megabytes are delivered before that, by one task after another, unless mail
    waits for the success of the request. Without a scope a message is delivered at
    once. Where mail goes to Celery, the task hands it over, with a scope or without.

    :param deliver: The task, which raises or returns what :func:`deliver` returns.
    :param ends: It ends for sure. Else nothing is collected: a task delivers each.
    """

    def __init__(
        self,
        rerouted: ReroutedMail,
        pool: ConnectionPool,
        deliver: Deliver,
        ends: bool = True,
    ) -> None:
        self._rerouted = rerouted
        self._pool = pool
        self._deliver = deliver
        # What each message goes over, without a scope.
        is_kept = rerouted.find_scope() or isinstance(deliver, HandsOver)
        self._connection = None if is_kept else pool.connection()
        self._batch: Batch = collections.deque()
        self._size = 0
        self._limit = 0.0 if not ends else math.inf if rerouted.on_success else BATCH
        self._delivery: Delivery = None

    def send(self, envelope: Envelope, then: Then = None) -> None:
        """Deliver a message, or have it delivered.

        :param then: What to call once it is delivered.
        :raises DeliveryError: Only without a scope: the message was not delivered.
        """
        self._batch.append((envelope, then))
        self._size += len(envelope.content)

        if self._connection is not None:
            if failures := _deliver_all(self._connection, self._batch):
                raise failures[0]
        elif self._size >= self._limit:
            self._begin_delivery()

    def end(self) -> None:
        """Have the rest delivered."""
        if self._connection is not None:
            self._connection.close()
        elif self._batch:
            self._begin_delivery()

    def _begin_delivery(self) -> None:
        """Have a task deliver the batch, once the one before is through."""
        if not self._rerouted.on_success:
            # So that little is held at a time.
            _find_error(self._delivery)

        self._delivery = self._rerouted.start(
            self._deliver, self._pool, self._batch, self._delivery
        )
        self._batch, self._size = collections.deque(), 0


def deliver(
    pool: ConnectionPool, batch: Batch, before: Delivery
) -> DeliveryError | None:
    """Deliver messages in order, and return what went wrong: which ones, and why.

    One that is refused does not stop the others. A server that can't be reached does:
    to wait for it once more for each of them would hold the request for minutes.

    :param before: The delivery of those before them, which has to be through.
    """
    give_up = _is_unreachable(_find_error(before))
    count = len(batch)

    with pool.connection() as connection:
        failures = _deliver_all(connection, batch, give_up)

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
    """Deliver a batch, tell of what was delivered, and return what went wrong."""
    told: list[cabc.Callable[[], object]] = []
    failures: list[DeliveryError] = []

    while batch:
        envelope, then = batch.popleft()

        try:
            if give_up:
                raise DeliveryError("It was not tried.")

            connection.send(envelope)

            if then is not None:
                told.append(then)
        except DeliveryError as error:
            error.message_id = envelope.message_id
            give_up = _is_unreachable(error)
            # What is below is of no use to those who read the log.
            failures.append(error.with_traceback(None))

    if told:
        # A receiver may send mail, and must not wait for the connection used for this.
        connection.close()

    for then in told:
        then()

    return failures


def _find_error(delivery: Delivery) -> BaseException | None:
    """Wait for a delivery, and return what went wrong."""
    # One of a scope around this one may wait for its success.
    if delivery is not None and not delivery.held:
        # It is cancelled if the time of the request is up.
        with contextlib.suppress(concurrent.futures.CancelledError):
            return delivery.exception() or delivery.result()

    return None


def _is_unreachable(error: BaseException | None) -> bool:
    """Tell whether the server let nobody in, at the last of the messages."""
    last = getattr(error, "failures", ())[-1:] or (error,)
    return isinstance(last[0], DeliveryError) and last[0].stage in OPENING | {None}
