from __future__ import annotations

import smtplib

from .executor.exceptions import ApiTaskError as ApiTaskError
from .executor.exceptions import ScopeClosed as ScopeClosed


class DeliveryError(ApiTaskError, smtplib.SMTPException):
    """Raised when a mail server did not take a message for all of its recipients.

    The text holds no address or credential, so it is safe to log: where the server
    quotes one, it is masked. The attributes hold the data as it is.

    This is an :exc:`smtplib.SMTPException`, as code written for Flask-Mail expects.

    :param message: What happened and, if known, what to do about it.
    :param message_id: The ``Message-ID`` of the message, to find it in a server's log.
    :param stage: The step of the SMTP dialogue: ``"connect"``, ``"greeting"``,
        ``"EHLO"``, ``"STARTTLS"``, ``"TLS"``, ``"AUTH"``, ``"MAIL"``, ``"RCPT"``,
        ``"DATA"``, ``"message"`` or ``"end of message"``; ``None`` before all of them.
    :param reply: The code and text of the server's refusal, if it sent one. They become
        ``smtp_code`` and ``smtp_error`` (bytes), as in
        :exc:`smtplib.SMTPResponseException`; otherwise both are ``None``.
    :param recipients: The refused recipients, each with the server's code and text, as
        in :exc:`smtplib.SMTPRecipientsRefused`.
    :param failures: The errors of the single messages, if this one stands for several
        messages of a ``connect()`` block.
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

    The server may or may not have accepted it. It is not sent again, as that could
    deliver it twice (:rfc:`5321#section-6.1` leaves the choice to the client).
    """
