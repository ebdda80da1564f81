from __future__ import annotations

import smtplib


class ApiTaskError(Exception):
    """Base class of every exception that Flask-ApiTask raises on its own account.

    A wrong argument or a wrong configuration value is a :exc:`ValueError` or a
    :exc:`TypeError`, as everywhere in Python, and not one of these.
    """


class ScopeClosed(ApiTaskError, RuntimeError):
    """Raised when a task is submitted to a :class:`.TaskScope` that was ended.

    :func:`.run` does not raise it: where the request's scope is closed already, it
    calls the task on the spot.
    """


class DeliveryError(ApiTaskError, smtplib.SMTPException):
    """Raised when a mail server did not take a message for all of its recipients.

    The text names the server's reply codes and holds no address, so it can be logged.
    It is an :exc:`smtplib.SMTPException`, as code written for Flask-Mail expects.

    :param message: What happened, and the remedy if there is one.
    :param message_id: The ``Message-ID`` of the message, to find it in a server's log.
    :param stage: Where in the dialogue it happened: ``"connect"``, ``"greeting"``,
        ``"EHLO"``, ``"STARTTLS"``, ``"TLS"``, ``"AUTH"``, ``"MAIL"``, ``"RCPT"``,
        ``"DATA"``, ``"message"`` or ``"end of message"``.
    """

    def __init__(
        self, message: str, *, message_id: str | None = None, stage: str | None = None
    ) -> None:
        super().__init__(message)
        self.message_id = message_id
        self.stage = stage

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} Message-ID: {self.message_id}" if self.message_id else text


class DeliveryUnknown(DeliveryError):
    """Raised when the connection was lost after a message's final dot.

    The server may or may not have accepted it, and a second attempt could deliver it
    twice, so none is made (:rfc:`5321#section-6.1` leaves the choice to the client).
    """
