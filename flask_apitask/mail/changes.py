from __future__ import annotations

import contextlib
import functools
import smtplib
import types
import typing as t

import flask_mail
from flask import current_app

from ..api import current_scope
from ..api import run
from ..exceptions import DeliveryError
from ..executor.task import task
from ..log import log_once
from .patches import find_in_class
from .patches import find_patch
from .patches import is_of
from .rendering import snapshot
from .replies import mask

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    # A method, and its arguments.
    Call: t.TypeAlias = "tuple[str, list[t.Any], dict[str, t.Any]]"


def find_change(mail: object, name: str, suppress: bool) -> str | None:
    """Name what somebody has put in place of something of Flask-Mail's, if it is so.

    :param name: ``"send"`` or ``"connect"``, of a ``Mail``.
    :param suppress: Nothing is to be sent, so it does not matter how.
    """
    if not is_of(flask_mail, object.__getattribute__(mail, name)):
        return f"{type(mail).__name__}.{name}"

    if name == "send":
        # It calls connect().
        return None

    if suppress:
        return find_in_class(flask_mail, "Connection", "configure_host")

    return find_patch(flask_mail, "Connection")


def use_change(app: Flask, change: str, name: str, value: t.Any) -> t.Any:
    """Have a task call somebody else's ``send`` or ``connect``, and say so once."""
    log_once(
        app,
        f"mail_{change}",
        "Flask-Mail is changed: %s. That sends the mail of this app, then, in the"
        " background as before, but with no kept connections and no pipelining; the"
        " APITASK_MAIL_* keys of connections have no effect.",
        change,
    )

    if current_scope() is None:
        return value

    return functools.partial(RecordedConnection if name == "connect" else _send, value)


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
        if name.startswith("__"):
            raise AttributeError(name)

        if self._calls is None:
            # Not in a block, whose end would send: it is as without us.
            return getattr(self._connect(), name)

        return functools.partial(self._record, name)

    def _record(self, name: str, /, *args: t.Any, **kwargs: t.Any) -> None:
        frozen = {key: _freeze(value) for key, value in kwargs.items()}
        call = name, [*map(_freeze, args)], frozen
        t.cast("list[Call]", self._calls).append(call)


def _freeze(value: t.Any) -> t.Any:
    """Take a message as it is now."""
    return snapshot(value) if isinstance(value, flask_mail.Message) else value


def _send(send: cabc.Callable[..., t.Any], *args: t.Any, **kwargs: t.Any) -> None:
    mail = types.SimpleNamespace(send=send)

    with RecordedConnection(lambda: contextlib.nullcontext(mail)) as recorded:
        recorded.send(*args, **kwargs)


@task("flask_mail.send")
def _replay(connect: cabc.Callable[[], t.Any], calls: list[Call]) -> None:
    try:
        with connect() as connection:
            for name, args, kwargs in calls:
                getattr(connection, name)(*args, **kwargs)
    except DeliveryError:
        raise
    except smtplib.SMTPException as error:
        # Its text is logged, and shows addresses and what the server says.
        recipients = getattr(error, "recipients", {})
        mail = current_app.extensions["mail"]
        secrets = [*recipients, str(mail.username or ""), str(mail.password or "")]
        code = getattr(error, "smtp_code", None)
        raise DeliveryError(
            f"The message was not delivered: {type(error).__name__}:"
            f" {mask(str(error), secrets)}.",
            reply=None if code is None else (code, getattr(error, "smtp_error", b"")),
            recipients=recipients,
        ) from None
