from __future__ import annotations

import contextlib
import copy
import threading
import typing as t
from collections import deque

import flask_mail
from flask import current_app

from .. import stack
from ..context import find_app_context
from ..exceptions import DeliveryError
from ..jobs import notify
from ..tasks import task
from .envelope import Envelope
from .envelope import Server
from .pool import ConnectionPool

if t.TYPE_CHECKING:
    import smtplib
    from types import TracebackType

    import typing_extensions as te
    from flask import Flask

    from ..config import Config
    from .pool import Lease

Address: t.TypeAlias = "str | tuple[str, str]"


def reroute(app: Flask, config: Config) -> None:
    """Send the mail of an app in the background of its requests.

    Flask-Mail makes every connection, for ``send`` and for ``connect``, by calling one
    name. Ours stands there from now on, and does as the original for all other apps.
    """
    if config.mail_tls_verify is False:
        app.logger.warning(
            "APITASK_MAIL_TLS_VERIFY is False: whoever answers for the mail server gets"
            " its credentials and the mail. Name a file of CA certificates instead."
        )

    app.extensions["apitask_mail"] = Transport(config)
    app.before_request(_MailCheck())
    flask_mail.Connection = RoutedConnection  # type: ignore[misc]


class Letter(t.NamedTuple):
    """A message as it was when it was sent: what to deliver, and what to tell of it."""

    envelope: Envelope
    message: flask_mail.Message


class Transport:
    """The SMTP connections of one app, opened by the settings that Flask-Mail read."""

    def __init__(self, config: Config) -> None:
        self._config = config
        # Guards the pool, which is made anew when the settings have changed.
        self._lock = threading.Lock()
        self._pool: ConnectionPool | None = None

    def pool(self, mail: t.Any) -> ConnectionPool:
        """Return the pool for what ``app.extensions["mail"]`` says by now."""
        config = self._config
        server = Server(
            host=mail.server,
            port=int(mail.port or 0),
            use_tls=bool(mail.use_tls),
            use_ssl=bool(mail.use_ssl),
            username=mail.username,
            password=mail.password,
            timeout=config.mail_timeout,
            tls_verify=config.mail_tls_verify,
            max_messages=mail.max_emails,
            debug=int(mail.debug),
        )

        with self._lock:
            former = self._pool

            if former is not None and former.server == server:
                return former

            pool = self._pool = ConnectionPool(
                server, size=config.mail_connections, keepalive=config.mail_keepalive
            )

        if former is not None:
            former.close()

        return pool

    def __del__(self) -> None:
        # An app has no end but this, so there is nobody to warn of an open pool.
        if self._pool is not None:
            self._pool.drop()


class RoutedConnection(flask_mail.Connection):
    """What stands in the place of Flask-Mail's own connection.

    In a scope, what is sent is rendered at once and delivered by one task when the
    block is left. Without one it is delivered at once. For an app that is not rerouted
    it is the original.
    """

    _route: _Delivery | _Background | None = None

    def __enter__(self) -> te.Self:
        transport = _find_transport(self.mail)

        if transport is None:
            return super().__enter__()

        pool = None if self.mail.suppress else transport.pool(self.mail)
        scope = stack.current_scope()
        is_open = scope is not None and not scope.closed
        self._route = _Background(pool) if is_open else _Delivery(pool)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._route is None:
            super().__exit__(exc_type, exc_value, tb)  # type: ignore[arg-type]
        else:
            self._route.close()

    def send(
        self, message: flask_mail.Message, envelope_from: Address | None = None
    ) -> None:
        """Check and render a message, and pass it on.

        :raises flask_mail.BadHeaderError: There is a newline in a header. Flask-Mail
            itself lets one through in ``cc``, ``bcc`` and ``extra_headers``.
        :raises DeliveryError: Only without a scope: the message was not delivered.
        """
        if self._route is None:
            return super().send(message, envelope_from)

        _refuse_newlines(message, envelope_from)
        self.host = t.cast("smtplib.SMTP", host := _Renderer())

        with contextlib.suppress(_Rendered):
            super().send(message, envelope_from)

        sender, recipients, content, mail_options, rcpt_options = host.arguments
        envelope = Envelope(
            sender,
            tuple(recipients),
            content,
            message.msgId,
            tuple(mail_options),
            tuple(rcpt_options),
        )
        self._route.send(Letter(envelope, _snapshot(message)))


class _Background:
    """Collects letters, and delivers them by one task of the current scope."""

    def __init__(self, pool: ConnectionPool | None) -> None:
        self._pool = pool
        self._letters: list[Letter] = []

    def send(self, letter: Letter) -> None:
        self._letters.append(letter)

    def close(self) -> None:
        if self._letters:
            stack.run_task(deliver, (self._pool, self._letters), {})


@task("flask_mail.send")
def deliver(pool: ConnectionPool | None, letters: list[Letter]) -> None:
    """Deliver letters in order.

    One that is refused does not stop the others. A server that can't be reached does:
    to wait for it once more for each of them would hold the request for minutes.

    :raises DeliveryError: Some were not delivered; the text says which, and why.
    """
    failures: list[DeliveryError] = []
    waiting = deque(letters)

    with contextlib.closing(_Delivery(pool)) as delivery:
        while waiting and (delivery.is_reachable or not failures):
            try:
                delivery.send(waiting.popleft())
            except DeliveryError as error:
                failures.append(error)

    failures.extend(
        DeliveryError("It was not tried.", message_id=letter.envelope.message_id)
        for letter in waiting
    )

    if len(failures) == 1:
        raise failures[0]

    if failures:
        causes = "\n".join(f"- {error}" for error in failures)
        raise DeliveryError(
            f"{len(failures)} of {len(letters)} messages were not delivered:\n{causes}"
        )


class _Delivery:
    """A connection, once it is needed, that stays for several letters.

    :param pool: Where it comes from; ``None`` if sending is suppressed.
    """

    def __init__(self, pool: ConnectionPool | None) -> None:
        self._pool = pool
        self._lease: Lease | None = None
        self._resources = contextlib.ExitStack()

    def close(self) -> None:
        """Give the connection back."""
        self._resources.close()

    @property
    def is_reachable(self) -> bool:
        """Whether there was a connection for the letter sent last."""
        return self._lease is not None and self._lease.is_connected

    def send(self, letter: Letter) -> None:
        """Deliver a letter, and tell of it.

        :raises DeliveryError: It was not delivered to all recipients.
        """
        try:
            self._send(letter.envelope)
        except DeliveryError as error:
            # Whatever failed, down to waiting for a free connection.
            error.message_id = letter.envelope.message_id
            raise

        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        # It is delivered: a receiver that fails must not make it a failure.
        notify(flask_mail.email_dispatched, app, {"message": letter.message})

    def _send(self, envelope: Envelope) -> None:
        if self._pool is None:
            return

        if self._lease is None:
            self._lease = self._resources.enter_context(self._pool.connection())

        self._lease.send(envelope)


class _Rendered(Exception):
    pass


class _Renderer:
    """Stands where Flask-Mail sends to, once it has checked and rendered a message."""

    def sendmail(self, *arguments: t.Any) -> None:
        self.arguments = arguments
        raise _Rendered


class _MailCheck:
    """Warns at the first request that there is no Flask-Mail to reroute."""

    _done = False

    def __call__(self) -> None:
        if self._done:
            return

        self._done = True

        if "mail" not in current_app.extensions:
            current_app.logger.warning(
                "APITASK_MAIL_BACKGROUND is on, but there is no 'Mail' on this Flask"
                " app. Create one with Mail(app), or switch the flag off."
            )


def _find_transport(mail: t.Any) -> Transport | None:
    """Return the transport of the app that a connection is for, if it is rerouted."""
    app_context = find_app_context()

    if app_context is None or app_context.app.extensions.get("mail") is not mail:
        return None

    return t.cast("Transport | None", app_context.app.extensions.get("apitask_mail"))


def _refuse_newlines(
    message: flask_mail.Message, envelope_from: Address | None
) -> None:
    """Refuse what would let text of a user add headers, where Flask-Mail does not."""
    headers = message.extra_headers or {}
    fields = [envelope_from or "", *message.cc, *message.bcc, *headers.items()]

    for field in fields:
        text = "".join(map(str, field))

        if "\n" in text or "\r" in text:
            raise flask_mail.BadHeaderError(
                "There is a newline in a 'cc', 'bcc', extra header or envelope sender."
            )


def _snapshot(message: flask_mail.Message) -> flask_mail.Message:
    """Copy a message, so that receivers of the signal get it as it was when sent."""
    snapshot = copy.copy(message)

    for name, value in vars(message).items():
        if isinstance(value, list | dict):
            setattr(snapshot, name, value.copy())

    return snapshot
