from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import typing as t
import weakref

from ..api import current_scope
from ..api import run
from ..exceptions import DeliveryError
from ..executor.pool import threads_enabled
from .envelope import SMTPSettings
from .pool import find_pool
from .smtp import OPENING

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from ..config import Config
    from .delivery import PooledConnection
    from .envelope import Envelope
    from .pool import ConnectionPool
    from .pool import Pools

    # What to deliver, and what to call once it is.
    Then: t.TypeAlias = cabc.Callable[[], object] | None
    Batch: t.TypeAlias = collections.deque[tuple[Envelope, Then]]

# Bytes of rendered messages with which a block begins to deliver while it is open.
BATCH = 4 * 1024 * 1024


class ReroutedMail:
    """The way that the mail of one app takes: its configuration and its connections."""

    def __init__(self, config: Config) -> None:
        self._config = config
        # A pool lives while it is in use or has something idle. So nothing is left of
        # the settings of a tenant that sends no more.
        self._pools: Pools = weakref.WeakValueDictionary()

    def pool(self, **settings: t.Any) -> ConnectionPool:
        """Return the pool for what a library says of its mail server by now.

        :param settings: Fields of :class:`.SMTPSettings`, as configuration has them: an
            environment variable makes a flag text, and a password a number.
        :raises ValueError: The settings can't be used, or a file not be read.
        """
        config = self._config
        made: dict[str, t.Any] = {
            "timeout": config.mail_timeout,
            "tls_verify": config.mail_tls_verify,
        }
        made |= settings

        for name in ("use_tls", "use_ssl"):
            made[name] = is_true(made[name])

        for name in ("username", "password"):
            made[name] = None if made[name] is None else str(made[name])

        made["port"] = int(made["port"] or 0)
        checked = SMTPSettings(**made)
        checked.tls_context()
        return find_pool(
            self._pools,
            checked,
            size=config.mail_connections,
            # None is kept where no thread could close it in time.
            keepalive=config.mail_keepalive if threads_enabled() else 0,
            owner=self,
        )


def is_true(value: object) -> bool:
    """Read a flag of a mail library, even if an environment variable made it text."""
    if isinstance(value, str):
        return value.strip().lower() not in {"", "0", "false", "no", "none", "off"}

    return bool(value)


def check_tls(config: cabc.Mapping[str, t.Any]) -> None:
    """Refuse both kinds of TLS at once.

    :raises ValueError: The text names the keys, and the usual port of each.
    """
    use_tls, use_ssl = config.get("MAIL_USE_TLS"), config.get("MAIL_USE_SSL")

    if is_true(use_tls) and is_true(use_ssl):
        raise ValueError(
            f"MAIL_USE_TLS is {use_tls!r} and MAIL_USE_SSL is {use_ssl!r}, but only one"
            " can be: STARTTLS, mostly on port 587, or TLS from the start, mostly on"
            " port 465."
        )


class MailBlock:
    """Messages that go over one connection, in order.

    In a scope they are collected, and delivered by one task at the end of the block;
    some megabytes are delivered before that, by one task after another. Without a scope
    a message is delivered at once.

    :param deliver: The task, which raises what :func:`deliver` returns.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        deliver: cabc.Callable[[ConnectionPool, Batch, bool], None],
    ) -> None:
        self.limit = BATCH
        self._pool = pool
        self._deliver = deliver
        # What each message goes over, without a scope.
        self._connection = None if current_scope() else pool.connection()
        self._batch: Batch = collections.deque()
        self._size = 0
        self._delivery: concurrent.futures.Future[None] | None = None

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
        elif self._size >= self.limit:
            self._begin_delivery()

    def end(self) -> None:
        """Have the rest delivered."""
        if self._connection is not None:
            self._connection.close()
        elif self._batch:
            self._begin_delivery()

    def _begin_delivery(self) -> None:
        """Have a task deliver the batch, once the one before is through."""
        error: BaseException | None = None

        if self._delivery is not None:
            # It is cancelled if the time of the request is up.
            with contextlib.suppress(concurrent.futures.CancelledError):
                error = self._delivery.exception()

        give_up = _is_unreachable(error)
        self._delivery = run(self._deliver, self._pool, self._batch, give_up)
        self._batch, self._size = collections.deque(), 0


def deliver(pool: ConnectionPool, batch: Batch, give_up: bool) -> DeliveryError | None:
    """Deliver messages in order, and return what went wrong: which ones, and why.

    One that is refused does not stop the others. A server that can't be reached does:
    to wait for it once more for each of them would hold the request for minutes.

    :param give_up: It could not be reached before.
    """
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


def _is_unreachable(error: BaseException | None) -> bool:
    """Tell whether the server let nobody in, at the last of the messages."""
    last = getattr(error, "failures", ())[-1:] or (error,)
    return isinstance(last[0], DeliveryError) and last[0].stage in OPENING | {None}
