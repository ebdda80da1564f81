from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import time
import typing as t
import weakref

import flask_mail

from ..api import current_scope
from ..api import find_holder
from ..api import run
from ..api import warn_without_apitask
from ..context import find_app_context
from ..exceptions import DeliveryError
from ..executor.pool import threads_enabled
from ..executor.task import task
from ..log import log_once
from ..on_success import run_on_success
from .announcing import announce
from .announcing import Outbox
from .changes import find_change
from .changes import use_change
from .envelope import SMTPSettings
from .pool import find_pool
from .rendering import check
from .rendering import render
from .rendering import snapshot
from .smtp import OPENING

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    from ..config import Config
    from .delivery import PooledConnection
    from .envelope import Envelope
    from .pool import ConnectionPool
    from .pool import Pools
    from .rendering import Address

    # What to deliver, and the message as it was then, if anybody is to be told of it.
    Batch: t.TypeAlias = collections.deque[tuple[Envelope, flask_mail.Message | None]]

# Bytes of rendered messages with which a block begins to deliver while it is open.
_BATCH = 4 * 1024 * 1024


def reroute(app: Flask, config: Config) -> None:
    """Send the mail of an app in the background of its requests."""
    _check_tls(app.config)

    if config.mail_tls_verify is False:
        log_once(
            app,
            "tls_verify",
            "APITASK_MAIL_TLS_VERIFY is False: whoever answers for the mail server gets"
            " its credentials and the mail. Name a file of CA certificates instead.",
        )

    app.extensions["apitask_mail"] = ReroutedMail(config)
    # To replace flask_mail.Connection would be plainer. But a Mail with a connect() or
    # send() of its own never gets there, and a patch of that name that is older than
    # ours takes ours along when it is undone. All that sends is looked up on a Mail.
    flask_mail._MailMixin.__getattribute__ = _look_up  # type: ignore[method-assign, assignment]


class ReroutedMail:
    """The way that the mail of one app takes: its configuration and its connections."""

    def __init__(self, config: Config) -> None:
        self._config = config
        # What decides where a mail goes, and what starts its delivery.
        on_success = config.mail_start == "success"
        self.find_scope = find_holder if on_success else current_scope
        self.start = run_on_success if on_success else run
        self.on_success: bool = on_success
        self.outbox = Outbox(on_success)
        # A pool lives while it is in use or has something idle. So nothing is left of
        # the settings of a tenant that sends no more.
        self._pools: Pools = weakref.WeakValueDictionary()

    def pool(self, mail: flask_mail._Mail) -> ConnectionPool:
        """Return the pool for what ``app.extensions["mail"]`` says by now.

        :raises ValueError: The settings can't be used, or the CA file not be read.
        """
        config = self._config
        settings = SMTPSettings(
            host=mail.server,
            port=int(mail.port or 0),
            use_tls=_is_true(mail.use_tls),
            use_ssl=_is_true(mail.use_ssl),
            # Environment variables bring numbers where they look like some.
            username=None if mail.username is None else str(mail.username),
            password=None if mail.password is None else str(mail.password),
            timeout=config.mail_timeout,
            tls_verify=config.mail_tls_verify,
            max_messages=int(mail.max_emails or 0) or None,
            debug=int(mail.debug),
        )
        settings.tls_context()
        return find_pool(
            self._pools,
            settings,
            size=config.mail_connections,
            # None is kept where no thread could close it in time.
            keepalive=config.mail_keepalive if threads_enabled() else 0,
            owner=self,
        )


def _is_true(value: object) -> bool:
    """Read a flag of Flask-Mail, also where an environment variable made it text."""
    if isinstance(value, str):
        return value.strip().lower() not in {"", "0", "false", "no", "none", "off"}

    return bool(value)


def _check_tls(config: cabc.Mapping[str, t.Any]) -> None:
    use_tls, use_ssl = config.get("MAIL_USE_TLS"), config.get("MAIL_USE_SSL")

    if _is_true(use_tls) and _is_true(use_ssl):
        raise ValueError(
            f"MAIL_USE_TLS is {use_tls!r} and MAIL_USE_SSL is {use_ssl!r}, but only one"
            " can be: STARTTLS, mostly on port 587, or TLS from the start, mostly on"
            " port 465."
        )


def _look_up(self: flask_mail._MailMixin, name: str) -> t.Any:
    """Look up an attribute of a ``Mail``, in place of its ``__getattribute__``."""
    value = object.__getattribute__(self, name)

    if name == "init_app":
        return functools.partial(_init_app, value)

    context = find_app_context() if name in {"connect", "send"} else None

    # It may belong to another app than the current one.
    if context is None or (vars(self).get("app") or context.app) != context.app:
        return value

    return _replace(self, name, value, context.app)


def _init_app(init_app: cabc.Callable[[Flask], t.Any], app: Flask) -> t.Any:
    if "apitask_mail" in app.extensions:
        _check_tls(app.config)

    return init_app(app)


def _replace(mail: flask_mail._MailMixin, name: str, value: t.Any, app: Flask) -> t.Any:
    """Return what sends for an app in place of ``connect`` or ``send``."""
    rerouted: ReroutedMail | None = app.extensions.get("apitask_mail")
    state: flask_mail._Mail | None = app.extensions.get("mail")

    if rerouted is None and _is_true(app.config.get("APITASK_MAIL_BACKGROUND")):
        warn_without_apitask(app, "A mail was sent")

    if rerouted is None or state is None:
        return value

    change = find_change(mail, name, bool(state.suppress))

    if change is None:
        connect = functools.partial(BackgroundConnection, rerouted, state)
        # Flask-Mail's own send() looks up connect() in turn.
        return connect if name == "connect" else value

    scope = rerouted.find_scope()
    return use_change(app, change, name, value, rerouted.start if scope else None)


class BackgroundConnection:
    """What ``mail.connect()`` returns, in place of a :class:`flask_mail.Connection`.

    In a scope, what is sent is rendered at once, and delivered by one task when the
    block is left; some megabytes are delivered before that, by one task after another,
    unless mail waits for the success of the request.
    Without a scope a message is delivered at once.
    """

    host = None

    def __init__(self, rerouted: ReroutedMail, mail: flask_mail._Mail) -> None:
        self.mail = mail
        self.num_emails = 0
        self._rerouted = rerouted
        self._left = False
        self._pool: ConnectionPool | None = None
        # What each message goes over, without a scope.
        self._connection: PooledConnection | None = None
        self._batch: Batch = collections.deque()
        self._size = 0
        self._delivery: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> te.Self:
        # What is suppressed takes no time, and the outbox of a test is in order so.
        if not self.mail.suppress:
            self._pool = self._rerouted.pool(self.mail)
            scope = self._rerouted.find_scope()
            self._connection = None if scope else self._pool.connection()

        return self

    def __exit__(self, *_: object) -> None:
        self._left = True

        if self._connection is not None:
            self._connection.close()
        elif self._pool is not None and self._batch:
            self._begin_delivery(self._pool)

    def send(
        self, message: flask_mail.Message, envelope_from: Address | None = None
    ) -> None:
        """Check and render a message, and pass it on.

        :raises AssertionError: There is no recipient or no sender, as in Flask-Mail.
        :raises flask_mail.BadHeaderError: There is a line break in a header. Flask-Mail
            lets one through in ``cc``, ``bcc``, ``extra_headers`` and attachments.
        :raises RuntimeError: The ``with`` block that this belongs to has been left.
        :raises DeliveryError: Only without a scope: the message was not delivered.
        """
        if self._left:
            raise RuntimeError(
                "This connection ended with the 'with mail.connect()' block that it"
                " comes from. Send inside of the block."
            )

        check(message, envelope_from)
        self.num_emails += 1

        if message.date is None:
            message.date = time.time()

        # Those who listen now are those who are told, as in Flask-Mail.
        listened = bool(flask_mail.email_dispatched.receivers)
        copied = snapshot(message) if listened else None

        if self._pool is None:
            self._rerouted.outbox.tell(copied)
            return

        envelope = render(message, envelope_from)
        self._batch.append((envelope, copied))
        self._size += len(envelope.content)

        if self._connection is not None:
            if failures := _deliver_all(self._connection, self._batch):
                raise failures[0]
        elif self._size >= _BATCH and not self._rerouted.on_success:
            self._begin_delivery(self._pool)

    def _begin_delivery(self, pool: ConnectionPool) -> None:
        """Have a task deliver the batch, once the one before is through."""
        error: BaseException | None = None

        if self._delivery is not None:
            # It is cancelled if the time of the request is up.
            with contextlib.suppress(concurrent.futures.CancelledError):
                error = self._delivery.exception()

        give_up = _is_unreachable(error)
        self._delivery = self._rerouted.start(deliver, pool, self._batch, give_up)
        self._batch, self._size = collections.deque(), 0

    def send_message(self, *args: t.Any, **kwargs: t.Any) -> None:
        """Send what the arguments of :class:`flask_mail.Message` say."""
        self.send(flask_mail.Message(*args, **kwargs))


@task("flask_mail.send")
def deliver(pool: ConnectionPool, batch: Batch, give_up: bool = False) -> None:
    """Deliver messages in order.

    One that is refused does not stop the others. A server that can't be reached does:
    to wait for it once more for each of them would hold the request for minutes.

    :param give_up: It could not be reached before.
    :raises DeliveryError: Some were not delivered; the text says which, and why.
    """
    count = len(batch)

    with pool.connection() as connection:
        failures = _deliver_all(connection, batch, give_up)

    if len(failures) == 1:
        raise failures[0]

    if failures:
        causes = "\n".join(f"- {error}" for error in failures)
        raise DeliveryError(
            f"{len(failures)} of {count} messages were not delivered:\n{causes}",
            recipients={
                recipient: reply
                for error in failures
                for recipient, reply in error.recipients.items()
            },
            failures=tuple(failures),
        )


# The exit of the process waits for it: the timeouts of its connection bound it.
deliver.exit_grace = None  # type: ignore[attr-defined]


def _deliver_all(
    connection: PooledConnection, batch: Batch, give_up: bool = False
) -> list[DeliveryError]:
    """Deliver a batch, tell of what was delivered, and return what went wrong."""
    delivered: list[flask_mail.Message | None] = []
    failures: list[DeliveryError] = []

    while batch:
        envelope, message = batch.popleft()

        try:
            if give_up:
                raise DeliveryError("It was not tried.")

            connection.send(envelope)
            delivered.append(message)
        except DeliveryError as error:
            error.message_id = envelope.message_id
            give_up = _is_unreachable(error)
            # What is below is of no use to those who read the log.
            failures.append(error.with_traceback(None))

    if any(message is not None for message in delivered):
        # A receiver may send mail, and must not wait for the connection used for this.
        connection.close()

    announce(delivered)
    return failures


def _is_unreachable(error: BaseException | None) -> bool:
    """Tell whether the server let nobody in, at the last of the messages."""
    last = getattr(error, "failures", ())[-1:] or (error,)
    return isinstance(last[0], DeliveryError) and last[0].stage in OPENING | {None}
