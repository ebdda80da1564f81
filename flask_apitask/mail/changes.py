from __future__ import annotations

import contextlib
import functools
import smtplib
import types
import typing as t

import flask_mail
from flask import current_app
from flask_mail import Message

from ..exceptions import DeliveryError
from ..log import log_once
from .patches import find_in_class
from .patches import find_parts
from .patches import is_of
from .patches import Part
from .rendering import snapshot
from .replies import mask

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    # A method, and its arguments.
    Call: t.TypeAlias = "tuple[str, list[t.Any], dict[str, t.Any]]"
    # run(), or run_on_success().
    Start: t.TypeAlias = cabc.Callable[..., t.Any]


class Change:
    """What somebody has put in place of something of Flask-Mail's, and has to be there.

    :param name: The first of it, for the log.
    """

    def __init__(self, mail: object, method: str, suppress: bool, name: str) -> None:
        self.name = name
        # But for the method itself, which the task has.
        other = "send" if method == "connect" else "connect"
        self._find_parts = functools.partial(_find_parts, mail, suppress, other)
        self._changed = [part for part in self._find_parts() if part.is_changed]

    def check(self) -> None:
        """Refuse to send by anything else, such as Flask-Mail after the end of a mock.

        :raises DeliveryError: It is not there any more.
        """
        found = {part.path: part.value for part in self._find_parts()}

        for path, value, _ in self._changed:
            if found.get(path) is not value:
                raise DeliveryError(
                    f"Nothing was sent: {'.'.join(path)} was changed as the message was"
                    " sent in the request, and the change was undone before a task had"
                    " used it. Undo a patch after the tasks of the request."
                )


def find_change(mail: object, name: str, suppress: bool) -> Change | None:
    """Find what somebody has put in place of something of Flask-Mail's, if it is so.

    :param name: ``"send"`` or ``"connect"``, of a ``Mail``.
    :param suppress: Nothing is to be sent, so it does not matter how.
    """
    for part in _find_parts(mail, suppress, name):
        if part.is_changed:
            return Change(mail, name, suppress, str(part))

        if name == "send":
            # It calls connect().
            break

    return None


def _find_parts(mail: object, suppress: bool, name: str) -> cabc.Iterator[Part]:
    # As it is there, not bound to anything.
    holders = mail, *type(mail).__mro__
    method = next(vars(h)[name] for h in holders if name in vars(h))
    path = type(mail).__name__, name
    yield Part(path, method, not is_of(flask_mail, method))

    if suppress:
        yield from find_in_class(flask_mail, "Connection", "configure_host")
    else:
        yield from find_parts(flask_mail, "Connection")


def use_change(
    app: Flask, change: Change, name: str, value: t.Any, start: Start | None
) -> t.Any:
    """Have a task call somebody else's ``send`` or ``connect``, and say so once.

    :param start: What starts the task; ``None`` where it is a plain call.
    """
    log_once(
        app,
        f"mail_{change.name}",
        "Flask-Mail is changed: %s. That sends the mail of this app, then, in the"
        " background as before, but with no kept connections and no pipelining; the"
        " APITASK_MAIL_* keys of connections have no effect.",
        change.name,
    )

    if start is None:
        return value

    how = RecordedConnection if name == "connect" else _send
    return _InTask(how, start, change, value)


class _InTask(functools.partial[t.Any]):
    """Has a task call a method, and is that method to those who look at it: a mock."""

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self.args[-1], name)


class RecordedConnection:
    """What ``mail.connect()`` returns where somebody else's code sends.

    What is done with it in a ``with`` block is done later by one task, with what the
    other ``connect()`` returns there: all of it is theirs, and none of it ours.
    """

    host = None

    def __init__(
        self, start: Start, change: Change, connect: cabc.Callable[[], t.Any]
    ) -> None:
        self.mail = current_app.extensions["mail"]
        self.num_emails = 0
        self._start = start
        self._change = change
        self._connect = connect
        self._calls: list[Call] | None = None

    def __enter__(self) -> te.Self:
        self._calls = []
        return self

    def __exit__(self, *_: object) -> None:
        if self._calls:
            self._start(_replay, self._change, self._connect, self._calls)

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
        self.num_emails += name in {"send", "send_message"}


def _freeze(value: t.Any) -> t.Any:
    """Take a message as it is now. A mock in the place of its class has none."""
    return snapshot(value) if isinstance(value, Message) else value


def _send(
    start: Start,
    change: Change,
    send: cabc.Callable[..., t.Any],
    *args: t.Any,
    **kwargs: t.Any,
) -> None:
    mail = types.SimpleNamespace(send=send)
    connect = functools.partial(contextlib.nullcontext, mail)

    with RecordedConnection(start, change, connect) as recorded:
        recorded.send(*args, **kwargs)


# It has no exit_grace, unlike our own: Flask-Mail gives smtplib no timeout, so nothing
# else bounds it.
def _replay(
    change: Change, connect: cabc.Callable[[], t.Any], calls: list[Call]
) -> None:
    try:
        change.check()

        with connect() as connection:
            for name, args, kwargs in calls:
                change.check()
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


# Not by task(), which would name a second function so.
_replay.task_name = "flask_mail.send"  # type: ignore[attr-defined]
