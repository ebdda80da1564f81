from __future__ import annotations

import contextlib
import functools
import inspect
import time
import types
import typing as t

import flask_mail
from flask import current_app

from ..calling import notify
from ..context import find_app_context
from .changes import find_change
from .changes import OUTSIDE
from .changes import OwnConnect
from .changes import use_change
from .rendering import check
from .rendering import render
from .rendering import snapshot
from .sending import find_rerouted
from .sending import MailBlock
from .settings import is_suppressed
from .settings import read_settings

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    from .rendering import Address
    from .sending import ReroutedMail


def reroute() -> None:
    """Make every ``Mail`` look up ``connect`` and ``send`` for the current app."""
    # It would be simpler to replace flask_mail.Connection. But a Mail with its own
    # connect() or send() never uses it, and undoing a patch of that name that is older
    # than ours would undo ours too. Everything that sends is looked up on a Mail.
    flask_mail._MailMixin.__getattribute__ = _look_up  # type: ignore[method-assign, assignment]


def _look_up(self: flask_mail._MailMixin, name: str) -> t.Any:
    """Look up an attribute of a ``Mail``, in place of its ``__getattribute__``."""
    value = object.__getattribute__(self, name)

    if name == "init_app":
        return functools.partial(_init_app, value)

    if isinstance(value, OwnConnect):
        # It was looked up here, perhaps in another app, and put back by a test or kept
        # under another name.
        name, value = "connect", types.MethodType(type(self).connect, self)

    context = find_app_context() if name in {"connect", "send"} else None

    # This Mail may belong to another app than the current one.
    if context is None or (vars(self).get("app") or context.app) != context.app:
        return value

    return _replace(self, name, value, context.app)


def _init_app(init_app: cabc.Callable[[Flask], t.Any], app: Flask) -> t.Any:
    if rerouted := app.extensions.get("apitask_mail"):
        read_settings(app.config, rerouted.config)

    return init_app(app)


def _replace(mail: flask_mail._MailMixin, name: str, value: t.Any, app: Flask) -> t.Any:
    """Return what an app uses in place of ``connect`` or ``send``."""
    rerouted = find_rerouted(app)
    state: flask_mail._Mail | None = app.extensions.get("mail")

    if rerouted is None or state is None:
        return value

    change = find_change(mail, name, state)

    if change is None:
        connect = OwnConnect(BackgroundConnection, rerouted, state)
        # Flask-Mail's own send() will look up connect() in turn.
        return connect if name == "connect" else value

    if _is_async(value):
        # The view awaits what it returns, or uses it in an "async with" block.
        return value

    scope = rerouted.find_scope()
    return use_change(app, change, name, value, rerouted.start if scope else None)


def _is_async(method: t.Any) -> bool:
    if inspect.iscoroutinefunction(method):
        return True

    # Below @asynccontextmanager is a generator. A proxy may unwrap to itself for ever.
    with contextlib.suppress(ValueError):
        return inspect.isasyncgenfunction(inspect.unwrap(method))

    return False


class BackgroundConnection:
    """Stands in for a :class:`flask_mail.Connection`, from ``mail.connect()``.

    It checks and renders a message at once, and passes it on to a :class:`.MailBlock`.
    """

    # If a test sets this to a mock, the mock sends, as in Flask-Mail.
    host: t.Any = None

    def __init__(self, rerouted: ReroutedMail, mail: flask_mail._Mail) -> None:
        self.mail = mail
        self.num_emails = 0
        self._rerouted = rerouted
        self._is_open = False
        self._block: MailBlock | None = None

    def __enter__(self) -> te.Self:
        self._is_open = True

        # Suppressed mail needs no task: it takes no time, and a test finds its outbox
        # in order.
        if self._block is None and not is_suppressed(self.mail):
            self._block = MailBlock(self._rerouted, "flask_mail.send", self.mail)

        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        block, self._block = self._block, None

        if block is not None:
            block.end()

        if self.host is not None:
            self.host.quit()

    def send(
        self, message: flask_mail.Message, envelope_from: Address | None = None
    ) -> None:
        """Check and render a message, and pass it on.

        :raises AssertionError: There is no recipient or no sender, as in Flask-Mail.
        :raises flask_mail.BadHeaderError: There is a line break in a header. Flask-Mail
            lets one through in ``cc``, ``bcc``, ``extra_headers`` and attachments.
        :raises RuntimeError: This is outside the ``with`` block of this connection.
        :raises DeliveryError: Only without a scope: the message was not delivered.
        """
        if not self._is_open:
            raise RuntimeError(OUTSIDE)

        check(message, envelope_from)
        self.num_emails += 1

        if self.host is not None:
            connection = flask_mail.Connection(self.mail)  # type: ignore[arg-type]
            connection.host = self.host
            connection.send(message, envelope_from)
            return

        if message.date is None:
            message.date = time.time()

        # As in Flask-Mail, what counts is whether there are receivers now.
        listened = bool(flask_mail.email_dispatched.receivers)
        then = functools.partial(_announce, snapshot(message)) if listened else None

        if self._block is not None:
            self._block.send(render(message, envelope_from), then)
        elif then is not None:
            self._rerouted.outbox.tell(then)

    def send_message(self, *args: t.Any, **kwargs: t.Any) -> None:
        """Send a :class:`flask_mail.Message` made from these arguments."""
        self.send(flask_mail.Message(*args, **kwargs))


def _announce(message: flask_mail.Message) -> None:
    """Announce a delivered message. If a receiver raises, the delivery still counts."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    notify(flask_mail.email_dispatched, app, {"message": message})
