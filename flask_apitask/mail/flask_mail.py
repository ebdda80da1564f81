from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import email
import email.errors
import functools
import logging
import re
import smtplib
import time
import typing as t

import flask_mail
from flask import current_app

from ..api import current_scope
from ..api import run
from ..context import find_app_context
from ..exceptions import DeliveryError
from ..executor.pool import threads_enabled
from ..executor.task import task
from ..log import log
from ..runner import notify
from .changes import find_change
from .envelope import Envelope
from .envelope import SMTPSettings
from .pool import ConnectionPools
from .replies import mask

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    from ..config import Config
    from .pool import ConnectionPool
    from .pool import PooledConnection

# Bytes of rendered messages with which a block begins to deliver while it is open.
_BATCH = 4 * 1024 * 1024

_LINE_BREAK = re.compile(r"[\r\n]")
# Before Python 3.13, email ends a line of a header wherever str.splitlines() does.
_SEPARATOR = re.compile(r"[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")

T = t.TypeVar("T")
Address: t.TypeAlias = "str | tuple[str, str]"
# A method, and its arguments.
Call: t.TypeAlias = "tuple[str, tuple[t.Any, ...], dict[str, t.Any]]"
# What to deliver, and the message as it was then, if anybody wants to be told of it.
Outgoing: t.TypeAlias = "tuple[Envelope, flask_mail.Message | None]"


def reroute(app: Flask, config: Config) -> ReroutedMail:
    """Return what sends the mail of an app in the background of its requests.

    It does so once it is among the app's extensions, as ``"apitask_mail"``.

    All that Flask-Mail sends goes through ``send`` and ``connect`` of a ``Mail``, which
    are looked up by our function from now on. It changes nothing for other apps.

    :raises ValueError: There are two kinds of TLS at once.
    """
    check_tls(app.config)

    if config.mail_tls_verify is False:
        app.logger.warning(
            "APITASK_MAIL_TLS_VERIFY is False: whoever answers for the mail server gets"
            " its credentials and the mail. Name a file of CA certificates instead."
        )

    flask_mail._MailMixin.__getattribute__ = _look_up  # type: ignore[method-assign, assignment]
    return ReroutedMail(config)


class ReroutedMail:
    """The way that the mail of one app takes: its configuration and its connections."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pools = ConnectionPools()
        self._told: set[str] = set()

    def pool(self, mail: flask_mail._Mail) -> ConnectionPool:
        """Return the pool for what ``app.extensions["mail"]`` says by now."""
        config = self._config
        settings = SMTPSettings(
            host=mail.server,
            port=int(mail.port or 0),
            use_tls=is_true(mail.use_tls),
            use_ssl=is_true(mail.use_ssl),
            # Environment variables bring numbers where they look like some.
            username=None if mail.username is None else str(mail.username),
            password=None if mail.password is None else str(mail.password),
            timeout=config.mail_timeout,
            tls_verify=config.mail_tls_verify,
            max_messages=int(mail.max_emails or 0) or None,
            debug=int(mail.debug),
        )
        # None is kept where no thread could close it in time.
        keepalive = config.mail_keepalive if threads_enabled() else 0
        return self._pools.get(
            settings, size=config.mail_connections, keepalive=keepalive
        )

    def tell(self, app: Flask, change: str) -> None:
        """Warn, once, of something that sends in our place."""
        if change not in self._told:
            self._told.add(change)
            log(
                app.logger,
                logging.WARNING,
                "Flask-Mail is changed: %s. That sends the mail of this app, then, in"
                " the background as before, but with no kept connections and no"
                " pipelining; the APITASK_MAIL_* keys of connections have no effect.",
                change,
            )


def is_true(value: object) -> bool:
    """Read a flag of Flask-Mail, also where an environment variable made it text."""
    if isinstance(value, str):
        return value.strip().lower() not in {"", "0", "false", "no", "none", "off"}

    return bool(value)


def check_tls(config: cabc.Mapping[str, t.Any]) -> None:
    """Refuse the keys of an app that ask for two kinds of TLS at once."""
    use_tls, use_ssl = config.get("MAIL_USE_TLS"), config.get("MAIL_USE_SSL")

    if is_true(use_tls) and is_true(use_ssl):
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

    if context is None:
        return value

    app: Flask = context.app
    rerouted: ReroutedMail | None = app.extensions.get("apitask_mail")
    mail: flask_mail._Mail | None = app.extensions.get("mail")

    # It may belong to another app than the current one.
    if rerouted is None or mail is None or (vars(self).get("app") or app) != app:
        return value

    change = find_change(self, name, is_true(mail.suppress))

    if change is None:
        connect = functools.partial(BackgroundConnection, rerouted, mail)
        # Flask-Mail's own send() looks up connect() in turn.
        return connect if name == "connect" else value

    rerouted.tell(app, change)

    if current_scope() is None:
        return value

    return functools.partial(
        RecordedConnection if name == "connect" else _send_changed, value
    )


def _init_app(init_app: cabc.Callable[[Flask], T], app: Flask) -> T:
    if "apitask_mail" in app.extensions:
        check_tls(app.config)

    return init_app(app)


class BackgroundConnection:
    """What ``mail.connect()`` returns, in place of a :class:`flask_mail.Connection`.

    In a scope, what is sent is rendered at once, and delivered by one task when the
    block is left; some megabytes are delivered before that, by one task after another.
    Without a scope a message is delivered at once.
    """

    host = None

    def __init__(self, rerouted: ReroutedMail, mail: flask_mail._Mail) -> None:
        self.mail = mail
        self.num_emails = 0
        self._rerouted = rerouted
        self._left = False
        self._batch: collections.deque[Outgoing] = collections.deque()
        self._size = 0
        self._delivery: concurrent.futures.Future[None] | None = None
        # Where the batch goes to; or, without a scope, each message.
        self._pool: ConnectionPool | None = None
        self._connection: PooledConnection | None = None

    def __enter__(self) -> te.Self:
        # What is suppressed takes no time, and the outbox of a test is in order so.
        if self.mail.suppress:
            return self

        pool = self._rerouted.pool(self.mail)

        if current_scope() is None:
            self._connection = pool.connection()
        else:
            self._pool = pool

        return self

    def __exit__(self, *_: object) -> None:
        self._left = True

        if self._connection is not None:
            self._connection.close()

        if self._pool is not None and self._batch:
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
        copied = _snapshot(message) if listened else None

        if self._connection is None and self._pool is None:
            _announce([copied])
            return

        envelope = render(message, envelope_from)
        self._batch.append((envelope, copied))
        self._size += len(envelope.content)

        if self._connection is not None:
            delivered, failures = _send(self._connection, self._batch)
            _announce(delivered)

            if failures:
                raise failures[0]

        elif self._pool is not None and self._size >= _BATCH:
            self._begin_delivery(self._pool)

    def _begin_delivery(self, pool: ConnectionPool) -> None:
        """Have a task deliver the batch, once the one before is through."""
        give_up = False

        if self._delivery is not None:
            # It is cancelled if the time of the request is up.
            with contextlib.suppress(concurrent.futures.CancelledError):
                error = self._delivery.exception()
                give_up = isinstance(error, DeliveryError) and error.unreachable

        self._delivery = run(deliver, pool, self._batch, give_up)
        self._batch, self._size = collections.deque(), 0

    def send_message(self, *args: t.Any, **kwargs: t.Any) -> None:
        """Send what the arguments of :class:`flask_mail.Message` say."""
        self.send(flask_mail.Message(*args, **kwargs))


@task("flask_mail.send")
def deliver(
    pool: ConnectionPool, batch: collections.deque[Outgoing], give_up: bool = False
) -> None:
    """Deliver messages in order.

    One that is refused does not stop the others. A server that can't be reached does:
    to wait for it once more for each of them would hold the request for minutes.

    :param give_up: It could not be reached before, so nothing is tried.
    :raises DeliveryError: Some were not delivered; the text says which, and why.
    """
    with pool.connection() as connection:
        delivered, failures = _send(connection, batch, give_up)

    # A receiver may send mail, and must not wait for the connection used for this.
    _announce(delivered)

    if failures:
        # From here, as what is below is of no use to those who read the log.
        error = _sum_up(failures, len(delivered) + len(failures))
        error.unreachable = not connection.is_reachable
        raise error


# The exit of the process waits for it: the timeouts of its connection bound it.
deliver.exit_grace = None  # type: ignore[attr-defined]


def _send(
    connection: PooledConnection,
    batch: collections.deque[Outgoing],
    give_up: bool = False,
) -> tuple[list[flask_mail.Message | None], list[DeliveryError]]:
    """Send a batch, and return what was delivered and what went wrong."""
    delivered: list[flask_mail.Message | None] = []
    failures: list[DeliveryError] = []

    while batch:
        envelope, message = batch.popleft()

        try:
            if (failures or give_up) and not connection.is_reachable:
                raise DeliveryError("It was not tried.")

            connection.send(envelope)
            delivered.append(message)
        except DeliveryError as error:
            error.message_id = envelope.message_id
            failures.append(error.with_traceback(None))

    return delivered, failures


def _sum_up(failures: list[DeliveryError], count: int) -> DeliveryError:
    if len(failures) == 1:
        return failures[0]

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


def _announce(messages: list[flask_mail.Message | None]) -> None:
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]

    for message in messages:
        if message is not None:
            # It is delivered: a receiver that fails must not make it a failure.
            notify(flask_mail.email_dispatched, app, {"message": message})


def check(message: flask_mail.Message, envelope_from: Address | None = None) -> None:
    """Refuse what Flask-Mail does, and line breaks where it lets them through."""
    if not message.send_to:
        raise AssertionError("No recipients have been added")

    if not message.sender:
        raise AssertionError(
            "The message does not specify a sender and a default sender has not been"
            " configured"
        )

    # A subject may be folded, as Flask-Mail checks.
    texts = _header_texts(message, envelope_from)
    broken = any(map(_LINE_BREAK.search, texts))

    if broken or message.has_bad_headers():
        raise _bad_header()


def render(
    message: flask_mail.Message, envelope_from: Address | None = None
) -> Envelope:
    """Render a message as Flask-Mail does.

    :raises flask_mail.BadHeaderError: A separator in a text has made a header of it.
    """
    try:
        content = message.as_bytes()

        if any(map(_SEPARATOR.search, _header_texts(message, envelope_from))):
            harmless = _clean(message)

            if _outline(content) != _outline(harmless.as_bytes()):
                raise _bad_header()
    except email.errors.MessageError as error:
        # Newer versions of Python find it out by themselves.
        raise _bad_header() from error

    return Envelope(
        flask_mail.sanitize_address(envelope_from or message.sender),
        tuple(flask_mail.sanitize_addresses(message.send_to)),
        content,
        message.msgId,
        tuple(message.mail_options),
        tuple(message.rcpt_options),
    )


def _header_texts(
    message: flask_mail.Message, envelope_from: Address | None
) -> cabc.Iterator[str]:
    """Yield what goes into headers, but for the folds that a subject may have."""
    headers = message.extra_headers or {}
    yield str(message.subject or "").replace("\r\n", "")
    fields: list[t.Any] = [envelope_from or "", message.sender, message.reply_to or ""]
    fields += [*message.recipients, *message.cc, *message.bcc, *headers.items()]

    for attachment in message.attachments:
        fields += [attachment.filename or "", attachment.content_type]
        fields += [attachment.disposition, *attachment.headers.items()]

    for field in fields:
        yield "".join(map(str, field))


def _bad_header() -> flask_mail.BadHeaderError:
    return flask_mail.BadHeaderError(
        "There is a line break in an address, the subject, an extra header, an"
        " attachment's name or headers, or the envelope's sender."
    )


def _clean(value: t.Any) -> t.Any:
    """Copy a message, or a part of it, without separators in what goes into headers."""
    if isinstance(value, flask_mail.Message | flask_mail.Attachment):
        clean = copy.copy(value)
        vars(clean).update(
            (name, _clean(part))
            for name, part in vars(value).items()
            if name not in {"body", "alts", "data"}
        )
        return clean

    if isinstance(value, dict):
        return {_clean(name): _clean(part) for name, part in value.items()}

    if isinstance(value, list | tuple):
        return type(value)(map(_clean, value))

    # Anything else may be a lazy text.
    is_number = value is None or isinstance(value, int | float)
    return value if is_number else _SEPARATOR.sub("_", str(value))


def _outline(content: bytes) -> list[tuple[list[str], int]]:
    """Return the headers of each part of a message, by name, and what is odd there."""
    parts = email.message_from_bytes(content).walk()
    return [(sorted(map(str.lower, part)), len(part.defects)) for part in parts]


class RecordedConnection:
    """What ``mail.connect()`` returns where somebody else's code sends.

    What is done with it in a ``with`` block is done later by one task, with what the
    other ``connect()`` returns there: all of it is theirs, and none of it ours.
    """

    def __init__(self, connect: cabc.Callable[[], t.Any]) -> None:
        self._connect = connect
        self._calls: list[Call] | None = None

    def __enter__(self) -> te.Self:
        self._calls = []
        return self

    def __exit__(self, *_: object) -> None:
        if self._calls:
            run(_replay, self._connect, self._calls)

    def __getattr__(self, name: str) -> t.Any:
        if self._calls is None:
            # Not in a block, whose end would send: it is as without us.
            return getattr(self._connect(), name)

        return functools.partial(self._record, name)

    def _record(self, name: str, /, *args: t.Any, **kwargs: t.Any) -> None:
        t.cast("list[Call]", self._calls).append((name, _freeze(args), kwargs))


@task("flask_mail.send")
def _replay(connect: cabc.Callable[[], t.Any], calls: list[Call]) -> None:
    with _without_addresses(), connect() as connection:
        for name, args, kwargs in calls:
            getattr(connection, name)(*args, **kwargs)


def _send_changed(
    send: cabc.Callable[..., t.Any], *args: t.Any, **kwargs: t.Any
) -> None:
    """Have a task call somebody else's ``send``."""
    run(_call, send, _freeze(args), kwargs)


@task("flask_mail.send")
def _call(
    send: cabc.Callable[..., t.Any], args: tuple[t.Any, ...], kwargs: dict[str, t.Any]
) -> None:
    with _without_addresses():
        send(*args, **kwargs)


def _freeze(args: tuple[t.Any, ...]) -> tuple[t.Any, ...]:
    """Take messages as they are now."""
    return tuple(
        _snapshot(arg) if isinstance(arg, flask_mail.Message) else arg for arg in args
    )


@contextlib.contextmanager
def _without_addresses() -> cabc.Iterator[None]:
    """Turn errors of :mod:`smtplib`, which show addresses, into what can be logged."""
    try:
        yield
    except DeliveryError:
        raise
    except smtplib.SMTPException as error:
        recipients = getattr(error, "recipients", {})
        code = getattr(error, "smtp_code", None)
        raise DeliveryError(
            f"The message was not delivered: {type(error).__name__}:"
            f" {mask(str(error), recipients)}.",
            reply=None if code is None else (code, getattr(error, "smtp_error", b"")),
            recipients=recipients,
        ) from None


def _snapshot(message: flask_mail.Message) -> flask_mail.Message:
    """Copy a message, so that receivers of the signal get it as it was when sent."""
    snapshot = copy.copy(message)

    for name, value in vars(message).items():
        if isinstance(value, list | dict):
            setattr(snapshot, name, value.copy())

    return snapshot
