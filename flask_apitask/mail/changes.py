from __future__ import annotations

import contextlib
import functools
import smtplib
import types
import typing as t

import flask_mail
from flask import current_app

from ..exceptions import DeliveryError
from ..executor.task import task
from ..log import log_once
from .rendering import snapshot
from .replies import mask

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    # A method, and its arguments.
    Call: t.TypeAlias = "tuple[str, list[t.Any], dict[str, t.Any]]"
    # Something that takes part in the sending: its name, and whether it is changed.
    Part: t.TypeAlias = "tuple[tuple[str, ...], object, bool]"
    # run(), or run_on_success().
    Start: t.TypeAlias = cabc.Callable[..., t.Any]


_CLASSES = {"Connection", "SMTP", "SMTP_SSL"}


class Change:
    """What somebody has put in place of something of Flask-Mail's, and has to be there.

    :param name: The first of it, for the log.
    """

    def __init__(self, mail: object, method: str, suppress: bool, name: str) -> None:
        self.name = name
        # But for the method itself, which the task has.
        other = "send" if method == "connect" else "connect"
        self._find_parts = functools.partial(_find_parts, mail, suppress, other)
        self._changed = [part[:2] for part in self._find_parts() if part[2]]

    def check(self) -> None:
        """Refuse to send by anything else, such as Flask-Mail after the end of a mock.

        :raises DeliveryError: It is not there any more.
        """
        found = {name: value for name, value, _ in self._find_parts()}

        for name, value in self._changed:
            if found.get(name) is not value:
                raise DeliveryError(
                    f"Nothing was sent: {'.'.join(name)} was changed as the message was"
                    " sent in the request, and the change was undone before a task had"
                    " used it. Undo a patch after the tasks of the request."
                )


def find_change(mail: object, name: str, suppress: bool) -> Change | None:
    """Find what somebody has put in place of something of Flask-Mail's, if it is so.

    A function has the globals of its module, whatever it is called. That can be told at
    any time, so it does not matter who came first, and a patch may be undone.

    :param name: ``"send"`` or ``"connect"``, of a ``Mail``.
    :param suppress: Nothing is to be sent, so it does not matter how.
    """
    for part, value, is_changed in _find_parts(mail, suppress, name):
        if is_changed:
            shown = f" (it is {value!r})" if part[-1] in _CLASSES else ""
            return Change(mail, name, suppress, ".".join(part) + shown)

        if name == "send":
            # It calls connect().
            break

    return None


def _find_parts(mail: object, suppress: bool, name: str) -> cabc.Iterator[Part]:
    # As it is there, not bound to anything.
    holders = mail, *type(mail).__mro__
    method = next(vars(h)[name] for h in holders if name in vars(h))
    yield (type(mail).__name__, name), method, not _is_of(flask_mail, method)

    if suppress:
        yield from _find_in_class(flask_mail, "Connection", "configure_host")
        return

    library = vars(flask_mail)["smtplib"]
    yield ("flask_mail", "smtplib"), library, library is not smtplib
    yield from _find_in_class(flask_mail, "Connection")
    yield from _find_in_class(smtplib, "SMTP")
    yield from _find_in_class(smtplib, "SMTP_SSL")


def _find_in_class(module: t.Any, name: str, ignored: str = "") -> cabc.Iterator[Part]:
    cls, path = getattr(module, name), (module.__name__, name)

    # A proxy says that it is what it stands for, but not to type().
    if type(cls) is not type or (cls.__module__, cls.__qualname__) != path:
        yield path, cls, True
        return

    yield path, cls, False

    for method, function in vars(cls).items():
        if callable(function) and method != ignored:
            yield (*path, method), function, not _is_of(module, function)


def _is_of(module: t.Any, function: object) -> bool:
    return type(function) is types.FunctionType and function.__globals__ is vars(module)


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
    """Take a message as it is now."""
    return snapshot(value) if isinstance(value, flask_mail.Message) else value


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
@task("flask_mail.send")
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
