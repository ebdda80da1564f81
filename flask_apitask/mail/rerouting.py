from __future__ import annotations

import contextlib
import copy
import re
import typing as t

import flask_mail
from flask import current_app

from .. import api
from ..context import find_app_context
from .delivery import Background
from .delivery import Delivery
from .delivery import Letter
from .delivery import Transport
from .envelope import Envelope

if t.TYPE_CHECKING:
    import smtplib
    from types import TracebackType

    import typing_extensions as te
    from flask import Flask

    from ..config import Config

# Before Python 3.13, email.policy ends a header at whatever str.splitlines() does.
_LINE_BREAK = re.compile(r"[\n-\r\x1c-\x1e\x85\u2028\u2029]")

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

    # Flask refuses this once the app has served. Then nothing else has been done.
    app.before_request(_MailCheck())
    app.extensions["apitask_mail"] = Transport(config)
    flask_mail.Connection = RoutedConnection  # type: ignore[misc]


class RoutedConnection(flask_mail.Connection):
    """What stands in the place of Flask-Mail's own connection.

    In a scope, what is sent is rendered at once and delivered by one task when the
    block is left. Without one it is delivered at once. For an app that is not rerouted
    it is the original.
    """

    _route: Delivery | Background | None = None
    _left = False

    def __enter__(self) -> te.Self:
        transport = _find_transport(self.mail)

        if transport is None:
            return super().__enter__()

        pool = None if self.mail.suppress else transport.pool(self.mail)
        scope = api.current_scope()
        is_open = scope is not None and not scope.closed
        # What is suppressed takes no time, and the outbox of a test is in order so.
        if pool is None or not is_open:
            self._route = Delivery(pool)
        else:
            self._route = Background(pool)

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
            self._left = True
            self._route.close()

    def send(
        self, message: flask_mail.Message, envelope_from: Address | None = None
    ) -> None:
        """Check and render a message, and pass it on.

        :raises flask_mail.BadHeaderError: There is a line break in a header. Flask-Mail
            lets one through in ``cc``, ``bcc``, ``extra_headers`` and attachments.
        :raises RuntimeError: The ``with`` block that this belongs to has been left.
        :raises DeliveryError: Only without a scope: the message was not delivered.
        """
        if self._route is None:
            return super().send(message, envelope_from)

        if self._left:
            raise RuntimeError(
                "This connection ended with the 'with mail.connect()' block that it"
                " comes from. Send inside of the block."
            )

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
    fields: list[t.Any] = [envelope_from or "", message.sender or ""]
    fields += [message.reply_to or "", *message.recipients, *message.cc, *message.bcc]
    fields += headers.items()
    # A subject may be folded, as Flask-Mail checks.
    fields.append(str(message.subject or "").replace("\r\n", ""))

    for attachment in message.attachments:
        fields += [attachment.filename or "", attachment.content_type]
        fields += attachment.headers.items()

    for field in fields:
        if _LINE_BREAK.search("".join(map(str, field))):
            raise flask_mail.BadHeaderError(
                "There is a line break in an address, the subject, an extra header, an"
                " attachment's name or headers, or the envelope's sender."
            )


def _snapshot(message: flask_mail.Message) -> flask_mail.Message:
    """Copy a message, so that receivers of the signal get it as it was when sent."""
    snapshot = copy.copy(message)

    for name, value in vars(message).items():
        if isinstance(value, list | dict):
            setattr(snapshot, name, value.copy())

    return snapshot
