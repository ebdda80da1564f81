"""The backend of Flask-Mailman that sends in the background.

``MAIL_BACKEND = "smtp"``, the default, means this one in an app that has
``APITASK_MAIL_BACKGROUND`` on. Beside another backend, it goes by its own name,
``"flask_apitask.mail.flask_mailman"``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import typing as t

import flask_mailman  # type: ignore[import-untyped]
from flask import current_app
from flask_mailman.backends import smtp  # type: ignore[import-untyped]

from ..exceptions import DeliveryError
from ..executor.task import task
from ..log import log
from ..log import log_once
from . import sending
from .mailman_rendering import render
from .patches import find_parts
from .sending import find_rerouted
from .sending import MailBlock

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    from .pool import ConnectionPool
    from .sending import Batch
    from .sending import Delivery
    from .sending import ReroutedMail

# What MAIL_BACKEND is for the backend of Flask-Mailman in whose place ours comes.
_SMTP = (
    "smtp",
    "flask_mailman.backends.smtp",
    "flask_mailman.backends.smtp.EmailBackend",
    smtp.EmailBackend,
)

_KEYS = (
    *("port", "use_tls", "use_ssl", "username", "password"),
    *("timeout", "ssl_certfile", "ssl_keyfile"),
)

_get_connection = flask_mailman._MailMixin.get_connection


def reroute() -> None:
    """Have the default backend looked up as it is for the app of the moment."""
    # To set MAIL_BACKEND would be plainer. But a Mail that was initialised before has
    # read it, and for one that comes later it would mean real mail in a test.
    flask_mailman._MailMixin.get_connection = _get_rerouted_connection


def _get_rerouted_connection(
    self: t.Any, backend: t.Any = None, fail_silently: bool = False, **kwds: t.Any
) -> t.Any:
    """Make a connection, in place of the ``get_connection`` of a ``Mail``."""
    if backend is None:
        backend = _find_backend(getattr(self, "app", None) or current_app)

    return _get_connection(self, backend, fail_silently, **kwds)


def _find_backend(app: Flask) -> type[EmailBackend] | None:
    """Return our backend if it comes in place of the default one of an app."""
    mailman = app.extensions.get("mailman")

    if mailman is None or mailman.backend not in _SMTP or not find_rerouted(app):
        return None

    for part in find_parts(smtp, "EmailBackend"):
        if part.is_changed:
            log_once(
                app,
                f"mail_{part}",
                "Flask-Mailman is changed: %s. That sends the mail of this app, then,"
                " and not in the background; the APITASK_MAIL_* keys have no effect.",
                part,
            )
            return None

    return EmailBackend


class EmailBackend(smtp.EmailBackend):  # type: ignore[misc]
    """Check and render messages in the caller, and have a task deliver them.

    In a ``with`` block they are collected, and one task delivers them when it is left.
    The connections of the app are kept, so there is none that ``open()`` has to make.
    """

    _block: MailBlock | None = None

    def open(self) -> bool:
        """Begin a block, and tell whether there was none."""
        with self._lock:
            if self._block is not None:
                return False

            # It may never be closed.
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
        """Pass messages on, and return how many: those that have a recipient.

        Without a scope it is how many were delivered, as in Flask-Mailman.

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

        try:
            t.cast("MailBlock", self._block).send(envelope)
        except DeliveryError as error:
            if not self.fail_silently:
                raise

            _log_silenced(error)
            return False

        return True

    def _make_block(self, *, ends: bool) -> MailBlock:
        rerouted: ReroutedMail | None = current_app.extensions.get("apitask_mail")

        if rerouted is None:
            raise RuntimeError(
                f"{__name__} sends in the background, but {current_app.name!r} has no"
                " ApiTask with APITASK_MAIL_BACKGROUND on. Set it, or let MAIL_BACKEND"
                " be 'smtp', which goes by it."
            )

        keys = {f"MAIL_{name.upper()}": getattr(self, name) for name in _KEYS}
        pool = rerouted.pool({**keys, "MAIL_SERVER": self.host})
        delivery = functools.partial(deliver, self.fail_silently)
        return MailBlock(rerouted, pool, delivery, ends)


@task("flask_mailman.send")
def deliver(
    fail_silently: bool, pool: ConnectionPool, batch: Batch, before: Delivery
) -> DeliveryError | None:
    """Deliver messages in order.

    :param fail_silently: Log what goes wrong and return it, and don't raise it.
    :raises DeliveryError: Some were not delivered; the text says which, and why.
    """
    if error := sending.deliver(pool, batch, before):
        if not fail_silently:
            raise error

        _log_silenced(error)

    return error


# The exit of the process waits for it: the timeouts of its connection bound it.
deliver.exit_grace = None  # type: ignore[attr-defined]


def _log_silenced(error: DeliveryError) -> None:
    # Without the error itself, whose traceback would keep what the request has used.
    text = "A mail was not delivered, which fail_silently allows: %s"
    log(current_app.logger, logging.INFO, text, str(error))
