from __future__ import annotations

import contextlib
import functools
import smtplib
import types
import typing as t

import flask_mail

from ..exceptions import DeliveryError
from ..log import log_once
from .patches import find_in_class
from .patches import find_parts
from .patches import is_of
from .patches import Part
from .rendering import snapshot
from .replies import mask
from .settings import is_suppressed

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te
    from flask import Flask

    # A method, and its arguments.
    Call: t.TypeAlias = "tuple[str, list[t.Any], dict[str, t.Any]]"
    # run(), or run_on_success().
    Start: t.TypeAlias = cabc.Callable[..., t.Any]


# The error of a connection that is used after its block, or before it.
OUTSIDE = (
    "Outside its 'with mail.connect()' block, this connection sends nothing."
    " Send inside the block."
)


class Change:
    """Other code in place of parts of Flask-Mail, which must still be there to send.

    :param state: The app's settings.
    :param name: The first changed part, for the log.
    """

    def __init__(
        self, mail: object, method: str, state: flask_mail._Mail, name: str
    ) -> None:
        self.name = name
        # The caller may have no app context: it may be a thread of the app's own.
        self.state = state
        suppress = is_suppressed(state)
        # All parts but the method itself, which the task holds.
        other = "send" if method == "connect" else "connect"
        self._find_parts = functools.partial(_find_parts, mail, suppress, other)
        self._changed = [part for part in self._find_parts() if part.is_changed]

    def check(self) -> None:
        """Refuse to send any other way, such as by Flask-Mail after a mock has ended.

        :raises DeliveryError: The change is no longer there.
        """
        found = {part.path: part.value for part in self._find_parts()}

        for path, value, _ in self._changed:
            if found.get(path) is not value:
                raise DeliveryError(
                    f"Nothing was sent: {'.'.join(path)} was changed when the request"
                    " sent the message, but the change was undone before the task ran."
                    " Undo a patch only after the tasks of the request are done."
                )


def find_change(mail: object, name: str, state: flask_mail._Mail) -> Change | None:
    """Return a change if other code is in place of a part of Flask-Mail.

    :param name: ``"send"`` or ``"connect"``, of a ``Mail``.
    :param state: The app's settings. If they suppress mail, changes to :mod:`smtplib`
        don't matter.
    """
    for part in _find_parts(mail, is_suppressed(state), name):
        if part.is_changed:
            return Change(mail, name, state, str(part))

        if name == "send":
            # send() calls connect(), where the rest is checked.
            break

    return None


def _find_parts(mail: object, suppress: bool, name: str) -> cabc.Iterator[Part]:
    # Look up the function itself, not a bound method.
    holders = mail, *type(mail).__mro__
    method = next(vars(h)[name] for h in holders if name in vars(h))
    path = type(mail).__name__, name

    # A test may put back what it looked up on the Mail before it put a mock there.
    if type(method) is types.MethodType and method.__self__ is mail:
        method = method.__func__

    is_own = is_of(flask_mail, method) or isinstance(method, OwnConnect)
    yield Part(path, method, not is_own)

    if suppress:
        yield from find_in_class(flask_mail, "Connection", "configure_host")
    else:
        yield from find_parts(flask_mail, "Connection")


def use_change(
    app: Flask, change: Change, name: str, value: t.Any, start: Start | None
) -> t.Any:
    """Let a task call somebody else's ``send`` or ``connect``, and warn once.

    :param start: Starts the task; ``None`` where it is a plain call.
    """
    log_once(
        app,
        f"mail_{change.name}",
        "Flask-Mail was changed: %s. The changed code sends the mail of this app, still"
        " in the background, but without kept connections and pipelining. The"
        " APITASK_MAIL_* keys for connections have no effect.",
        change.name,
    )

    if start is None:
        return value

    how = RecordedConnection if name == "connect" else _send
    return _InTask(how, start, change, value)


class OwnConnect(functools.partial[t.Any]):
    """Our own ``connect`` of a ``Mail``, where nobody has changed it."""


class _InTask(functools.partial[t.Any]):
    """Lets a task call a method, but looks like the method itself, such as a mock."""

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self.args[-1], name)

    def __setattr__(self, name: str, value: t.Any) -> None:
        setattr(self.args[-1], name, value)


class RecordedConnection:
    """The result of ``mail.connect()`` where somebody else's code sends.

    It records the calls in a ``with`` block, and one task repeats them later on the
    result of the other ``connect()``. So only the other code sends, and none of ours.
    """

    # If a test sets this to a mock, the other code sends over the mock.
    host: t.Any = None

    def __init__(
        self, start: Start, change: Change, connect: cabc.Callable[[], t.Any]
    ) -> None:
        self.mail = change.state
        self.num_emails = 0
        self._start = start
        self._change = change
        self._connect = connect
        self._calls: list[Call] | None = None
        self._has_ended = False

    def __enter__(self) -> te.Self:
        # A block may be within another one of the same connection.
        self._calls = self._calls or []
        return self

    def __exit__(self, *_: object) -> None:
        calls, self._calls = self._calls, None
        self._has_ended = True

        if calls:
            self._start(_replay, self._change, self._connect, calls)

        if self.host is not None:
            self.host.quit()

    def __getattr__(self, name: str) -> t.Any:
        if name.startswith("__"):
            raise AttributeError(name)

        if self._calls is None and not self._has_ended:
            # Without a block, there is no end at which to send: call it directly.
            return getattr(self._connect(), name)

        return functools.partial(self._record, name)

    def _record(self, name: str, /, *args: t.Any, **kwargs: t.Any) -> None:
        if self._calls is None:
            raise RuntimeError(OUTSIDE)

        self.num_emails += name in {"send", "send_message"}

        if self.host is not None:
            connection = self._connect()
            connection.host = self.host
            getattr(connection, name)(*args, **kwargs)
            return

        self._calls.append((name, snapshot([*args]), snapshot(kwargs)))


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


# Unlike our own delivery, this has no exit_grace of None: Flask-Mail gives smtplib no
# timeout, so the process might wait for ever at its exit.
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
        # The original text would be logged, with addresses and the server's words.
        recipients = getattr(error, "recipients", {})
        mail = change.state
        secrets = [*recipients, str(mail.username or ""), str(mail.password or "")]
        code = getattr(error, "smtp_code", None)
        raise DeliveryError(
            f"The message was not delivered: {type(error).__name__}:"
            f" {mask(str(error), secrets)}.",
            reply=None if code is None else (code, getattr(error, "smtp_error", b"")),
            recipients=recipients,
        ) from None


# Not with task(), which would give a second function this name.
_replay.task_name = "flask_mail.send"  # type: ignore[attr-defined]
