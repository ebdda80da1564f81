from __future__ import annotations

import smtplib

from .executor.exceptions import ApiTaskError as ApiTaskError
from .executor.exceptions import ScopeClosed as ScopeClosed


class DeliveryError(ApiTaskError, smtplib.SMTPException):
    """Raised when a mail server did not take a message for all of its recipients.

    The text holds no address and no credential, so it can be logged: where the server's
    words quote one, it is masked. What is data is in attributes, as it came.

    It is an :exc:`smtplib.SMTPException`, as code written for Flask-Mail expects.

    :param message: What happened, and the remedy if there is one.
    :param message_id: The ``Message-ID`` of the message, to find it in a server's log.
    :param stage: Where in the dialogue it happened: ``"connect"``, ``"greeting"``,
        ``"EHLO"``, ``"STARTTLS"``, ``"TLS"``, ``"AUTH"``, ``"MAIL"``, ``"RCPT"``,
        ``"DATA"``, ``"message"`` or ``"end of message"``; ``None`` before all of them.
    :param reply: The server's reply, if it was one that refused: then there are an
        ``smtp_code`` and the words as ``smtp_error``, in bytes, as in
        :exc:`smtplib.SMTPResponseException`. Else they are ``None``.
    :param recipients: The recipients that were refused, each with code and words, as in
        :exc:`smtplib.SMTPRecipientsRefused`.
    :param failures: The errors of the messages of a ``connect()`` block, if this one is
        for several.
    """

    def __init__(
        self,
        message: str,
        *,
        message_id: str | None = None,
        stage: str | None = None,
        reply: tuple[int, bytes] | None = None,
        recipients: dict[str, tuple[int, bytes]] | None = None,
        failures: tuple[DeliveryError, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message_id = message_id
        self.stage = stage
        self.smtp_code: int | None = None if reply is None else reply[0]
        self.smtp_error: bytes | None = None if reply is None else reply[1]
        self.recipients: dict[str, tuple[int, bytes]] = recipients or {}
        self.failures = failures

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} Message-ID: {self.message_id}" if self.message_id else text


class DeliveryUnknown(DeliveryError):
    """Raised when the connection was lost after a message's final dot.

    The server may or may not have accepted it, and a second attempt could deliver it
    twice, so none is made (:rfc:`5321#section-6.1` leaves the choice to the client).
    """
