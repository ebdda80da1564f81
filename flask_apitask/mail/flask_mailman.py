"""A Flask-Mailman backend that sends in the background.

``MAIL_BACKEND = "smtp"``, the default, means this backend in an app that has
``APITASK_MAIL_BACKGROUND`` on. To use it beside another backend, pass its name,
``"flask_apitask.mail.flask_mailman"``.
"""

from __future__ import annotations

import contextlib
import typing as t

import flask_mailman  # type: ignore[import-untyped]
from flask import current_app
from flask_mailman.backends import smtp  # type: ignore[import-untyped]

from ..context import find_app_context
from ..log import log_once
from .mailman_rendering import render
from .patches import find_parts
from .sending import find_rerouted
from .sending import MailBlock
from .settings import read_mail_flag

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    from .sending import ReroutedMail

# The values of MAIL_BACKEND for the Flask-Mailman backend that ours replaces.
_SMTP = (
    "smtp",
    "flask_mailman.backends.smtp",
    "flask_mailman.backends.smtp.EmailBackend",
    smtp.EmailBackend,
)

_get_connection = flask_mailman._MailMixin.get_connection


def reroute() -> None:
    """Make Flask-Mailman look up the default backend for the current app."""
    # It would be simpler to set MAIL_BACKEND. But a Mail initialised earlier has
    # already read it, and one initialised later would send real mail in a test.
    flask_mailman._MailMixin.get_connection = _get_rerouted_connection


def _get_rerouted_connection(
    self: t.Any, backend: t.Any = None, fail_silently: bool = False, **kwds: t.Any
) -> t.Any:
    """Make a connection, in place of the ``get_connection`` of a ``Mail``."""
    context = find_app_context()

    # This Mail may belong to another app than the current one.
    if context and (getattr(self, "app", None) or context.app) == context.app:
        backend = _find_backend(context.app, backend)

    return _get_connection(self, backend, fail_silently, **kwds)


def _find_backend(app: Flask, backend: t.Any) -> t.Any:
    """Return the backend to use in place of another one.

    :param backend: The one asked for, by name or as a class; ``None`` means that of
        ``MAIL_BACKEND``.
    """
    mailman = app.extensions.get("mailman")
    ours = (__name__, f"{__name__}.EmailBackend", EmailBackend)

    if backend is None and mailman is not None:
        is_replaced = mailman.backend in (*ours, *_SMTP)
    else:
        is_replaced = backend in ours

    if not is_replaced or not find_rerouted(app):
        return backend

    for part in find_parts(smtp, "EmailBackend"):
        if part.is_changed:
            log_once(
                app,
                f"mail_{part}",
                "Flask-Mailman was changed: %s. The changed code sends the mail of this"
                " app, and not in the background. The APITASK_MAIL_* keys have no"
                " effect.",
                part,
            )
            return "smtp"

    return EmailBackend


class EmailBackend(smtp.EmailBackend):  # type: ignore[misc]
    """Checks and renders messages in the caller, and lets a task deliver them.

    In a ``with`` block, messages are collected, and one task delivers them at its end.
    ``open()`` makes no connection, because those of the app are pooled.
    """

    _block: MailBlock | None = None

    def __setattr__(self, name: str, value: t.Any) -> None:
        # Flask-Mailman takes any text for a flag that is on, even "false".
        if name in {"use_tls", "use_ssl"}:
            value = read_mail_flag(f"MAIL_{name.upper()}", value)

        super().__setattr__(name, value)

    @property
    def server(self) -> t.Any:
        """The host, under its name in ``app.extensions["mailman"]``."""
        return self.host

    def open(self) -> bool:
        """Begin a block. Return ``False`` if there is one already."""
        with self._lock:
            if self._block is not None:
                return False

            # The block may never be closed.
            self._block = self._make_block(ends=False)
            return True

    def close(self) -> None:
        """End the block, if there is one."""
        with self._lock:
            block, self._block = self._block, None

            if block is not None:
                block.end()

    def __enter__(self) -> te.Self:
        with self._lock:
            self._block = self._block or self._make_block(ends=True)
            return self

    def send_messages(self, email_messages: cabc.Sequence[t.Any]) -> int:
        """Pass on the messages that have a recipient, and return how many there are.

        Without a scope, return how many were delivered, as Flask-Mailman does.

        :raises ValueError: A message has no sender, a bad address, a line break in a
            header (:exc:`flask_mailman.BadHeaderError`), or text that can't be encoded
            (:exc:`UnicodeEncodeError`). The messages before it are delivered.
        :raises DeliveryError: Only without a scope: a message was not delivered.
        """
        if not email_messages:
            return 0

        with self._lock, contextlib.nullcontext() if self._block else self:
            return sum(map(self._send, email_messages))

    def _send(self, email_message: t.Any) -> bool:
        if not email_message.recipients():
            return False

        envelope = render(email_message, self.mailman)
        return t.cast("MailBlock", self._block).send(envelope)

    def _make_block(self, *, ends: bool) -> MailBlock:
        rerouted: ReroutedMail | None = current_app.extensions.get("apitask_mail")

        if rerouted is None:
            raise RuntimeError(
                f"{__name__} sends in the background, but {current_app.name!r} has no"
                " ApiTask with APITASK_MAIL_BACKGROUND on. Turn it on, or set"
                " MAIL_BACKEND to 'smtp', which works with and without it."
            )

        return MailBlock(
            rerouted,
            "flask_mailman.send",
            self,
            fail_silently=self.fail_silently,
            ends=ends,
        )
