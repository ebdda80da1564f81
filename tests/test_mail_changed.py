from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import functools
import logging
import smtplib
import socket
import sys
import threading
import types
import typing as t
from unittest import mock

import flask_mail
import pytest
from child_process import ChildProcess
from conftest import PATIENCE
from flask import current_app
from flask import Flask
from flask import g
from flask_babel import Babel  # type: ignore[import-untyped]
from flask_babel import force_locale
from flask_babel import get_locale
from flask_babel import LazyString
from flask_mail import Mail
from flask_mail import Message
from mailbox_server import Mailbox
from smtp_servers import Fault
from smtp_servers import run_script
from smtp_servers import ScriptedServer
from smtp_servers import Stage
from werkzeug.local import LocalProxy

from flask_apitask import ApiTask
from flask_apitask import run
from flask_apitask import task_finished
from flask_apitask import wait
from flask_apitask.exceptions import DeliveryError

if t.TYPE_CHECKING:
    import collections.abc as cabc

    Patch = pytest.MonkeyPatch


# The subjects that somebody else's code was given.
sent: list[str] = []
# Set once the view has gone on; before that nothing is sent.
gone_on = threading.Event()


@pytest.fixture(autouse=True)
def nothing_sent() -> None:
    """Forget everything."""
    sent.clear()
    gone_on.set()


@pytest.fixture
def inbox() -> cabc.Iterator[Mailbox]:
    """Return the mail server that is reached by what is not changed."""
    with Mailbox() as mailbox:
        yield mailbox


def note(subject: str) -> None:
    """Send, in the way of this file: by keeping the subject."""
    assert gone_on.wait(PATIENCE)
    assert current_app.extensions["mail"]
    sent.append(subject)


def note_message(self: object, message: Message) -> None:
    """Be a method that sends."""
    note(message.subject)


class Host:
    """An SMTP client that keeps what it is given."""

    def sendmail(self, sender: str, to: object, content: bytes, *_: t.Any) -> None:
        note(content.partition(b"Subject: ")[2].partition(b"\r\n")[0].decode())

    def quit(self) -> None: ...

    def login(self, user: str, password: str) -> None: ...

    def set_debuglevel(self, level: int) -> None: ...


class Mine(flask_mail.Connection):
    """Another library's connection."""

    def configure_host(self) -> t.Any:
        return Host()

    def send_twice(self, message: Message) -> None:
        self.send(message)
        self.send(message)


class Foreign:
    """A connection that has nothing to do with Flask-Mail's."""

    def __init__(self, mail: object = None) -> None: ...

    def __enter__(self) -> Foreign:
        return self

    def __exit__(self, *_: object) -> None: ...

    def send(self, message: Message, envelope_from: str | None = None) -> None:
        note(message.subject)


class ConnectsMine(Mail):
    """A Mail that connects by itself."""

    def connect(self) -> t.Any:
        return Mine(current_app.extensions["mail"])


class ConnectsForeign(Mail):
    """A Mail that connects to something else."""

    def connect(self) -> t.Any:
        return Foreign()


class ConnectsFlaskMail(Mail):
    """A Mail that connects in its own way, to Flask-Mail's connection."""

    def connect(self) -> flask_mail.Connection:
        return flask_mail.Connection(current_app.extensions["mail"])


class Recipients(list[str]):
    """A list of its own class, as some libraries have."""


class Sends(Mail):
    """A Mail that sends by itself."""

    def send(self, message: Message) -> None:
        note(message.subject)


def make_host(*_: t.Any) -> t.Any:
    """Do what the constructor of an SMTP client does."""
    return Host()


def sendmail(self: smtplib.SMTP, *args: t.Any) -> None:
    """Be a method of an SMTP client."""
    Host().sendmail(*args)


@functools.wraps(flask_mail.Connection.configure_host)
def configure_host(self: flask_mail.Connection) -> t.Any:
    """Look like the original."""
    return Host()


class Proxy:
    """Is what it stands for, to all that asks it, and is called in its place."""

    def __init__(self, original: t.Any, call: cabc.Callable[..., t.Any]) -> None:
        self.original = original
        self.call = call

    def __getattribute__(self, name: str) -> t.Any:
        return getattr(object.__getattribute__(self, "original"), name)

    def __call__(self, *args: t.Any) -> t.Any:
        return object.__getattribute__(self, "call")(*args)


def use_module(patch: Patch) -> None:
    """Replace the module that Flask-Mail sends with."""
    patch.setattr(flask_mail, "smtplib", types.SimpleNamespace(SMTP=make_host))


CHANGES: dict[str, tuple[cabc.Callable[[Patch], object], type[Mail], str]] = {
    "configure_host": (
        lambda patch: patch.setattr(
            flask_mail.Connection, "configure_host", configure_host
        ),
        Mail,
        "flask_mail.Connection.configure_host",
    ),
    "a subclass": (
        lambda patch: patch.setattr(flask_mail, "Connection", Mine),
        Mail,
        "flask_mail.Connection (it is",
    ),
    "another class": (
        lambda patch: patch.setattr(flask_mail, "Connection", Foreign),
        Mail,
        "flask_mail.Connection (it is",
    ),
    "Connection.send": (
        lambda patch: patch.setattr(flask_mail.Connection, "send", note_message),
        Mail,
        "flask_mail.Connection.send",
    ),
    "a proxy of a class": (
        lambda patch: patch.setattr(
            flask_mail, "Connection", Proxy(flask_mail.Connection, Mine)
        ),
        Mail,
        "flask_mail.Connection (it is",
    ),
    "a proxy of a method": (
        lambda patch: patch.setattr(
            flask_mail.Connection,
            "configure_host",
            Proxy(flask_mail.Connection.configure_host, Host),
        ),
        Mail,
        "flask_mail.Connection.configure_host",
    ),
    "connect() of a subclass": (
        lambda patch: None,
        ConnectsMine,
        "ConnectsMine.connect",
    ),
    "connect() to another": (
        lambda patch: None,
        ConnectsForeign,
        "ConnectsForeign.connect",
    ),
    "connect() patched": (
        lambda patch: patch.setattr(Mail, "connect", lambda self: Foreign()),
        Mail,
        "Mail.connect",
    ),
    "send() of a subclass": (lambda patch: None, Sends, "Sends.send"),
    "send() patched": (
        lambda patch: patch.setattr(Mail, "send", note_message),
        Mail,
        "Mail.send",
    ),
    "send() of the base": (
        lambda patch: patch.setattr(flask_mail._MailMixin, "send", note_message),
        Mail,
        "Mail.send",
    ),
    "SMTP": (
        lambda patch: patch.setattr(smtplib, "SMTP", make_host),
        Mail,
        "smtplib.SMTP",
    ),
    "SMTP mocked": (
        lambda patch: patch.setattr(
            smtplib, "SMTP", mock.Mock(return_value=mock.Mock(wraps=Host()))
        ),
        Mail,
        "smtplib.SMTP",
    ),
    "a method of SMTP": (
        lambda patch: patch.setattr(smtplib.SMTP, "sendmail", sendmail),
        Mail,
        "smtplib.SMTP.sendmail",
    ),
    "a module": (use_module, Mail, "flask_mail.smtplib"),
}


class Changed(t.NamedTuple):
    """An app whose Flask-Mail somebody has changed."""

    app: Flask
    mail: Mail


def make_app(
    inbox: Mailbox, patch: Patch, way: str, order: str = "change first", **config: t.Any
) -> Changed:
    """Make an app, and make the change before it or after it."""
    change, kind, _ = CHANGES[way]
    app = Flask(__name__)
    app.config.update(
        MAIL_PORT=inbox.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
        APITASK_MAIL_KEEPALIVE=0,
    )
    app.config.update(config)

    if order == "change first":
        change(patch)

    if order == "Mail last":
        ApiTask(app)

    mail = kind(app)

    if order != "Mail last":
        ApiTask(app)

    if order != "change first":
        change(patch)

    @app.get("/")
    def view() -> str:
        gone_on.clear()
        mail.send(Message("hello", ["ada@example.org"], body="text"))
        gone_on.set()
        return ""

    return Changed(app, mail)


@pytest.mark.parametrize("order", ["change first", "change last", "Mail last"])
@pytest.mark.parametrize("way", CHANGES)
def test_the_change_is_what_sends(
    inbox: Mailbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
    order: str,
) -> None:
    """In a task, whatever was changed and when; and one WARNING names it."""
    app, _ = make_app(inbox, monkeypatch, way, order)
    finished: list[str] = []

    def notice(sender: Flask, name: str, **_: t.Any) -> None:
        finished.append(name)

    with task_finished.connected_to(notice, app):
        for _ in range(2):
            app.test_client().get("/")

    assert sent == ["hello", "hello"]
    assert finished == ["flask_mail.send", "flask_mail.send"]
    assert not inbox.messages
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert CHANGES[way][2] in record.getMessage()
    assert "without kept connections and pipelining" in record.getMessage()


@pytest.mark.parametrize("way", [way for way in CHANGES if "subclass" not in way])
def test_a_patch_that_is_undone(inbox: Mailbox, way: str) -> None:
    """After a temporary change, all is as it was before."""
    with pytest.MonkeyPatch.context() as patch:
        app, _ = make_app(inbox, patch, way, "change last", APITASK_MAIL_KEEPALIVE=5)

        if CHANGES[way][1] is not Mail:
            return

        app.test_client().get("/")
        assert len(sent) == 1

    for _ in range(2):
        app.test_client().get("/")

    assert len(sent) == 1
    assert inbox.subjects == ["hello", "hello"]
    assert len({id(session) for session in inbox.sessions}) == 1


@pytest.mark.parametrize("context", [Flask.app_context, contextlib.nullcontext])
@pytest.mark.parametrize("name", ["send", "connect"])
def test_a_method_that_is_put_back(
    inbox: Mailbox,
    caplog: pytest.LogCaptureFixture,
    name: str,
    context: cabc.Callable[[Flask], t.ContextManager[object]],
) -> None:
    """What a test has looked up and puts back after its mock is not a change."""
    with pytest.MonkeyPatch.context() as patch:
        app, mail = make_app(inbox, patch, "SMTP", APITASK_MAIL_KEEPALIVE=5)

    with context(app):
        original = getattr(mail, name)
        setattr(mail, name, mock.Mock())
        setattr(mail, name, original)

    for _ in range(2):
        app.test_client().get("/")

    assert inbox.subjects == ["hello", "hello"]
    assert len({id(session) for session in inbox.sessions}) == 1
    assert not caplog.records


def test_a_method_that_is_put_back_for_all_apps(inbox: Mailbox) -> None:
    """What one app's test has put back does not send another app's mail."""
    with pytest.MonkeyPatch.context() as patch:
        app, _ = make_app(inbox, patch, "SMTP")

    mail, other = Mail(), Flask("other")
    mail.init_app(app)
    mail.init_app(other)

    with app.app_context():
        mail.connect = mail.connect  # type: ignore[method-assign]

    with other.app_context():
        connection = mail.connect()

    assert type(connection) is flask_mail.Connection
    assert connection.mail is other.extensions["mail"]


def test_a_method_that_is_kept_under_another_name(inbox: Mailbox) -> None:
    """It makes the same connection as under its own name."""
    with pytest.MonkeyPatch.context() as patch:
        app, mail = make_app(inbox, patch, "SMTP")

    with app.app_context():
        mail.open = mail.connect  # type: ignore[attr-defined]
        assert type(mail.open()) is type(mail.connect())
        assert type(mail.connect()) is not flask_mail.Connection


def test_a_method_of_another_mail(inbox: Mailbox) -> None:
    """What is put in from another Mail is a change, and sends."""
    with pytest.MonkeyPatch.context() as patch:
        app, mail = make_app(inbox, patch, "SMTP")

    vars(mail)["send"] = Sends().send
    app.test_client().get("/")
    assert sent == ["hello"]
    assert not inbox.messages


def test_a_mock_that_is_told_what_to_do_in_a_request(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a test sets on the method that it looks up reaches its mock."""
    app, mail = make_app(inbox, monkeypatch, "SMTP")
    replaced = mock.Mock()
    monkeypatch.setattr(mail, "send", replaced)

    with app.test_request_context():
        send: t.Any = mail.send
        send.side_effect = LookupError

    assert replaced.side_effect is LookupError


@pytest.mark.parametrize("way", [way for way in CHANGES if CHANGES[way][1] is Mail])
def test_a_patch_that_is_undone_before_the_task(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """What was found sends, or nothing: never a mail past a mock that has ended."""
    with pytest.MonkeyPatch.context() as patch:
        app, mail = make_app(inbox, patch, way, APITASK_MAX_WORKERS=1)
        undone = threading.Event()

        with app.test_request_context():
            run(undone.wait, PATIENCE)
            mail.send(Message("hello", ["ada@example.org"], body="text"))
            patch.undo()
            undone.set()

    assert not inbox.messages
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]

    if way in {"connect() patched", "send() patched", "send() of the base"}:
        assert sent == ["hello"]
        assert not errors
    else:
        assert not sent
        assert len(errors) == 1
        assert "Nothing was sent: " in caplog.text


def test_a_patch_that_is_undone_by_the_first_of_two(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No half of a block goes past a mock, even if its connection is a real one."""

    def send_and_undo(self: smtplib.SMTP, *args: t.Any) -> None:
        sendmail(self, *args)
        monkeypatch.undo()

    with pytest.MonkeyPatch.context() as patch:
        app, mail = make_app(inbox, patch, "SMTP")

    monkeypatch.setattr(smtplib.SMTP, "sendmail", send_and_undo)

    with app.test_request_context(), mail.connect() as connection:
        for subject in ("one", "two"):
            connection.send(Message(subject, ["ada@example.org"], body="text"))

        assert connection.num_emails == 2
        assert connection.host is None
        assert connection.mail is app.extensions["mail"]

    assert sent == ["one"]
    assert not inbox.messages
    assert "Nothing was sent: smtplib.SMTP.sendmail was changed" in caplog.text


def test_tls_that_is_mocked_for_too_short_a_time(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """A mock of SMTP_SSL is handled like any other."""
    with pytest.MonkeyPatch.context() as patch:
        config: dict[str, t.Any] = {"MAIL_USE_SSL": True, "APITASK_MAX_WORKERS": 1}
        app, mail = make_app(inbox, patch, "SMTP", **config)

    undone = threading.Event()

    with app.test_request_context():
        run(undone.wait, PATIENCE)

        with mock.patch("smtplib.SMTP_SSL") as mocked:
            mail.send(Message("hello", ["ada@example.org"], body="text"))

        undone.set()

    assert not mocked.called
    assert "Nothing was sent: smtplib.SMTP_SSL was changed" in caplog.text


def watch(original: cabc.Callable[..., t.Any]) -> mock.Mock:
    """Make a mock that does what the original does."""
    return mock.Mock(wraps=original)


@pytest.mark.parametrize("wrap", [watch, functools.partial])
@pytest.mark.parametrize("name", ["send", "connect"])
def test_what_wraps_the_original(
    inbox: Mailbox,
    caplog: pytest.LogCaptureFixture,
    wrap: cabc.Callable[..., t.Any],
    name: str,
) -> None:
    """A mock that only watches, or a partial, sends as the original does."""
    with pytest.MonkeyPatch.context() as patch:
        app, mail = make_app(inbox, patch, "SMTP")

    setattr(mail, name, wrap(getattr(mail, name)))
    finished: list[str] = []

    def notice(sender: Flask, name: str, **_: t.Any) -> None:
        finished.append(name)

    with task_finished.connected_to(notice, app), app.test_request_context():
        message = Message("hello", ["ada@example.org"], body="text")
        mail.send(message)
        message.subject = "changed"
        wait()
        assert wrap is functools.partial or getattr(mail, name).called

    assert inbox.subjects == ["hello"]
    assert finished == ["flask_mail.send"]
    (record,) = caplog.records
    assert f"Mail.{name}" in record.getMessage()


def test_without_a_scope_the_change_sends_at_once(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a command, the change works as if we were not there."""
    app, mail = make_app(inbox, monkeypatch, "a subclass")

    with app.app_context():
        mail.send(Message("one", ["ada@example.org"], body="text"))
        assert type(mail.connect()) is Mine

    assert sent == ["one"]


@pytest.mark.parametrize("start", ["send", "success"])
@pytest.mark.parametrize("error", [None, smtplib.SMTPDataError(554, b"no")])
def test_a_thread_of_the_app_calls_the_change(
    inbox: Mailbox,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    error: smtplib.SMTPException | None,
) -> None:
    """It needs no context: a view may give ``mail.send`` to a thread of its own."""
    replaced = mock.Mock(side_effect=error)
    app, mail = make_app(inbox, monkeypatch, "SMTP", APITASK_MAIL_START=start)
    monkeypatch.setattr(mail, "send", replaced)
    message = Message("hello", ["ada@example.org"], body="text", sender="a@x.org")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with app.test_request_context():
            future = pool.submit(mail.send, message)

        raised = future.exception(PATIENCE)

    assert isinstance(raised, DeliveryError if error else type(None))
    assert replaced.call_count == 1


def test_a_block_is_one_task_in_order(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block over somebody's connection may use all that this one has."""
    app, mail = make_app(inbox, monkeypatch, "connect() of a subclass")

    with app.test_request_context():
        message = Message("one", ["ada@example.org"], body="text")

        with mail.connect() as connection:
            connection.send(message)
            message.subject = "two"
            t.cast("Mine", connection).send_twice(message)
            connection.send_message("three", ["ada@example.org"], body="text")
            assert not sent

        with mail.connect() as connection:
            assert not hasattr(connection, "__len__")

    assert sent == ["one", "two", "two", "three"]
    assert not inbox.messages


def test_what_is_set_as_the_host_of_a_connection_sends(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test's mock gets the message at once, and the connection behind it nothing."""
    app, mail = make_app(inbox, monkeypatch, "connect() of a subclass")

    with app.test_request_context(), mail.connect() as connection:
        connection.host = host = mock.Mock()
        connection.send(Message("hello", ["ada@example.org"], body="text"))
        assert host.sendmail.call_count == 1
        assert connection.num_emails == 1

    assert host.quit.call_count == 1
    assert not sent


@pytest.mark.parametrize("method", ["send", "send_message"])
def test_a_message_is_sent_as_it_was(inbox: Mailbox, method: str) -> None:
    """The task finds it as it was when it was sent, in the language of that moment."""
    app = Flask(__name__)
    app.config["MAIL_DEFAULT_SENDER"] = "shop@example.org"
    app.config.update(APITASK_MAIL_BACKGROUND=True, MAIL_PORT=inbox.port)
    heard: list[str] = []

    def hear(app: Flask, message: Message) -> None:
        heard.append(str(message.subject))

    Babel(app)
    mail = ConnectsFlaskMail(app)
    ApiTask(app)

    @app.get("/")
    def view() -> str:
        greeting: t.Any = LazyString(lambda: f"in {get_locale()}")
        to: list[str | tuple[str, str]] = []

        with mail.connect() as connection:
            for locale in ("de", "fr"):
                to[:] = [f"{locale}@example.org"]

                with force_locale(locale):
                    if method == "send":
                        connection.send(Message(greeting, to, body="text"))
                    else:
                        connection.send_message(greeting, recipients=to, body="text")

        return ""

    with flask_mail.email_dispatched.connected_to(hear, app):
        app.test_client().get("/")

    assert inbox.subjects == heard == ["in de", "in fr"]
    to = [message["To"] for message in inbox.messages]
    assert to == ["de@example.org", "fr@example.org"]


@pytest.mark.parametrize("recipients", [Recipients, set])
def test_what_a_message_holds_is_sent_as_it_was(
    inbox: Mailbox, recipients: t.Any
) -> None:
    """Later changes of a set, a subclass, or what a proxy stands for have no effect."""
    app = Flask(__name__)
    app.config["MAIL_DEFAULT_SENDER"] = "shop@example.org"
    app.config.update(APITASK_MAIL_BACKGROUND=True, MAIL_PORT=inbox.port)
    mail = ConnectsFlaskMail(app)
    ApiTask(app)
    subject: t.Any = LocalProxy(lambda: g.subject)
    headers = collections.OrderedDict({"X-Order": "1"})
    to = recipients(["ada@example.org"])

    with app.test_request_context(), mail.connect() as connection:
        g.subject = "hello"
        message = Message(subject, to, body="text", extra_headers=headers)
        connection.send(message)
        to.clear()
        headers["X-Order"] = "2"

    [received] = inbox.messages
    found = [received[name] for name in ("Subject", "To", "X-Order")]
    assert found == ["hello", "ada@example.org", "1"]


def test_a_connection_is_entered_again(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message is sent once, even in a block within another."""
    app, mail = make_app(inbox, monkeypatch, "connect() to another")

    def send(connection: flask_mail.Connection, subject: str) -> None:
        connection.send(Message(subject, ["ada@example.org"], body="text"))

    with app.test_request_context():
        with mail.connect() as connection:
            send(connection, "one")

            with connection:
                send(connection, "two")

        wait()
        assert sent == ["one", "two"]

        with connection:
            send(connection, "three")

    assert sent == ["one", "two", "three"]


def test_a_block_has_ended(inbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection behind it may be closed, and would lose what it is given."""
    app, mail = make_app(inbox, monkeypatch, "connect() of a subclass")
    receivers = mock.Mock()

    with (
        flask_mail.email_dispatched.connected_to(receivers),
        app.test_request_context(),
    ):
        message = Message("one", ["ada@example.org"], body="text")

        with mail.connect() as connection:
            send = connection.send

            with connection:
                connection.send(message)

            for late in (connection.send, send):
                with pytest.raises(RuntimeError, match="Send inside the block"):
                    late(message)

        wait()

    assert sent == ["one"]
    assert receivers.call_count == 1


def test_a_change_that_is_async(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """The view awaits a changed ``send()`` that is async, as without ApiTask."""

    class AsyncMail(Mail):
        async def send(self, message: Message) -> str:  # type: ignore[override]
            sent.append(str(message.subject))
            return "sent"

    app = Flask(__name__)
    app.config.update(MAIL_DEFAULT_SENDER="a@x.org", APITASK_MAIL_BACKGROUND=True)
    mail = AsyncMail(app)
    ApiTask(app)

    @app.get("/")
    async def index() -> str:
        return await mail.send(Message("one", ["ada@example.org"], body="text"))

    assert app.test_client().get("/").text == "sent"
    assert sent == ["one"]
    assert not caplog.records


def test_a_connection_that_is_async(inbox: Mailbox) -> None:
    """It is theirs too, whether they send over it or the view does."""

    class Connection:
        async def send(self, message: Message) -> None:
            sent.append(str(message.subject))

    class AsyncMail(Mail):
        @contextlib.asynccontextmanager
        async def connect(self) -> cabc.AsyncIterator[Connection]:  # type: ignore[override]
            yield Connection()

        async def send(self, message: Message) -> None:  # type: ignore[override]
            async with self.connect() as connection:
                await connection.send(message)

    app = Flask(__name__)
    app.config.update(MAIL_DEFAULT_SENDER="a@x.org", APITASK_MAIL_BACKGROUND=True)
    mail = AsyncMail(app)
    ApiTask(app)

    @app.get("/")
    async def index() -> str:
        await mail.send(Message("one", ["ada@example.org"], body="text"))

        async with mail.connect() as connection:
            await connection.send(Message("two", ["ada@example.org"], body="text"))

        return "sent"

    assert app.test_client().get("/").text == "sent"
    assert sent == ["one", "two"]


def test_a_change_that_has_every_attribute(inbox: Mailbox) -> None:
    """Such an object has code below it for ever, and is called like any other."""

    class Endless:
        def __getattr__(self, name: str) -> Endless:
            return Endless()

        def __call__(self, message: Message) -> None:
            note(message.subject)

    app = Flask(__name__)
    app.config.update(MAIL_DEFAULT_SENDER="a@x.org", APITASK_MAIL_BACKGROUND=True)
    mail = Mail(app)
    ApiTask(app)
    mail.send = Endless()  # type: ignore[method-assign]

    with app.test_request_context():
        mail.send(Message("one", ["ada@example.org"], body="text"))

    assert sent == ["one"]


def test_what_is_not_used_in_a_block_is_theirs(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a block there is no end at which anything could be sent."""
    app, mail = make_app(inbox, monkeypatch, "connect() to another")

    with app.test_request_context():
        mail.connect().send(Message("one", ["ada@example.org"], body="text"))
        assert sent == ["one"]


def test_a_change_that_looks_at_g(inbox: Mailbox) -> None:
    """What it finds there is what APITASK_COPY_G names, as in any task."""
    app = Flask(__name__)
    app.config.update(MAIL_DEFAULT_SENDER="shop@example.org", APITASK_COPY_G="port")
    app.config.update(APITASK_MAIL_BACKGROUND=True)

    class PerTenant(Mail):
        def connect(self) -> flask_mail.Connection:
            state = copy.copy(current_app.extensions["mail"])
            state.port = g.port
            return flask_mail.Connection(state)

    mail = PerTenant(app)
    ApiTask(app)

    @app.get("/")
    def view() -> str:
        g.port = inbox.port
        mail.send(Message("hello", ["ada@example.org"], body="text"))
        return ""

    app.test_client().get("/")
    assert inbox.subjects == ["hello"]


def test_another_subclass_goes_on_to_us(inbox: Mailbox) -> None:
    """A send() that changes the message and calls the original is done in the task."""

    class Tags(Mail):
        def send(self, message: Message) -> None:
            message.subject = f"[shop] {message.subject}"
            super().send(message)

    app = Flask(__name__)
    app.config.update(
        MAIL_PORT=inbox.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
        APITASK_MAIL_KEEPALIVE=0,
    )
    mail = Tags(app)
    ApiTask(app)

    with app.test_request_context():
        message = Message("hello", ["ada@example.org"], body="text")
        mail.send(message)
        message.subject = "changed"

    assert inbox.subjects == ["[shop] hello"]


def test_suppressed_mail_does_not_care_how_it_would_be_sent(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With TESTING on, a mocked smtplib does not matter, so nothing is logged."""
    app, mail = make_app(inbox, monkeypatch, "SMTP", TESTING=True)
    monkeypatch.setattr(flask_mail.Connection, "configure_host", configure_host)

    with mail.record_messages() as outbox:
        app.test_client().get("/")

    assert [message.subject for message in outbox] == ["hello"]
    assert not sent
    assert not caplog.records


REFUSED = {"ada@example.org": (550, b"5.1.1 <ada@example.org> no such user")}


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (smtplib.SMTPRecipientsRefused(REFUSED), "SMTPRecipientsRefused: ", None),
        (
            smtplib.SMTPSenderRefused(552, b"too big", "ada@example.org"),
            "SMTPSenderRefused: (552, b'too big', '<address>')",
            552,
        ),
        (smtplib.SMTPException("for ada@example.org"), "for <address>", None),
        (
            smtplib.SMTPAuthenticationError(535, b"5.7.8 shop-user, not pa55-word"),
            "(535, b'5.7.8 <hidden>, not <hidden>')",
            535,
        ),
        (DeliveryError("It was not attempted."), "It was not attempted.", None),
    ],
)
@pytest.mark.parametrize("way", ["SMTP", "send() of a subclass"])
def test_no_address_is_logged(
    inbox: Mailbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
    error: Exception,
    text: str,
    code: int | None,
) -> None:
    """An error of smtplib is data, and its text is masked for the log."""
    user = {"MAIL_USERNAME": "shop-user", "MAIL_PASSWORD": "pa55-word"}
    app, _ = make_app(inbox, monkeypatch, way, **user)
    failed: list[t.Any] = []

    def fail(*_: t.Any) -> None:
        # A new one, as the traceback refers to the app.
        raise type(error)(*error.args)

    def notice(sender: Flask, exception: Exception, **_: t.Any) -> None:
        failed.append(exception)

    monkeypatch.setattr(Host, "sendmail", fail)
    monkeypatch.setattr(f"{__name__}.note", fail)

    with task_finished.connected_to(notice, app):
        app.test_client().get("/")

    (caught,) = failed
    assert text in caplog.text
    assert "ada@" not in caplog.text
    assert caught.smtp_code == code
    assert caught.recipients == getattr(error, "recipients", {})


def test_a_mock_that_is_there_at_the_first_import(inbox: Mailbox) -> None:
    """A mock that is in place at import time is not kept."""
    run_script(
        """
import smtplib, sys
from unittest import mock
from flask import Flask
from flask_mail import Mail, Message

app = Flask(__name__)
app.config.update(
    MAIL_PORT=int(sys.argv[1]), MAIL_DEFAULT_SENDER="shop@example.org",
    APITASK_MAIL_BACKGROUND=True,
)
mail = Mail(app)

def send():
    with app.test_request_context():
        mail.send(Message("hello", ["ada@example.org"], "text"))

with mock.patch("smtplib.SMTP") as mocked, mock.patch("flask_mail.Connection") as made:
    from flask_apitask import ApiTask
    app.logger.setLevel("ERROR")
    ApiTask(app)
    send()
    assert made.called

send()
""",
        f"{inbox.port}",
    )
    assert inbox.subjects == ["hello"]


@pytest.mark.parametrize("autospec", [None, True])
@pytest.mark.parametrize("target", ["smtplib.socket", "socket.create_connection"])
def test_a_mock_of_what_connects(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture, target: str, autospec: bool | None
) -> None:
    """It is what connects, also where it answers nonsense, and no mail gets past it."""
    app, mail = Flask(__name__), Mail()
    app.config.update(
        MAIL_PORT=inbox.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
    )
    mail.init_app(app)
    ApiTask(app)
    client = app.test_client()

    @app.get("/")
    def view() -> str:
        mail.send(Message("hello", ["ada@example.org"], body="text"))
        return "ok"

    with mock.patch(target, autospec=autospec) as patched:
        assert client.get("/").text == "ok"

    mocked: t.Any = patched
    assert (mocked if "create" in target else mocked.create_connection).called
    assert not inbox.subjects
    assert caplog.records[-1].levelname == "ERROR"
    # It was recognized.
    assert "Flask-Mail was changed" in caplog.text
    assert client.get("/").text == "ok"
    assert inbox.subjects == ["hello"]


def test_another_way_to_connect_is_no_mock(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An app may bind its connections to an address, and mail goes on as before."""
    connect = functools.partial(
        socket.create_connection, source_address=("127.0.0.1", 0)
    )
    monkeypatch.setattr(socket, "create_connection", connect)
    app = Flask(__name__)
    app.config.update(MAIL_PORT=inbox.port, MAIL_DEFAULT_SENDER="shop@example.org")
    app.config.update(APITASK_MAIL_BACKGROUND=True)
    mail = Mail(app)
    ApiTask(app)

    with app.test_request_context():
        mail.send(Message("hello", ["ada@example.org"], body="text"))

    assert inbox.subjects == ["hello"]
    assert not caplog.records


def test_the_exit_does_not_wait_for_ever() -> None:
    """Flask-Mail has no timeout, so the exit does not wait for it for ever."""
    script = """
import sys
import flask_mail
import threading
from flask import Flask
from flask_apitask import ApiTask, task_started

class Mine(flask_mail.Connection):
    pass

flask_mail.Connection = Mine
app = Flask(__name__)
app.config.update(
    MAIL_PORT=int(sys.argv[1]), MAIL_DEFAULT_SENDER="shop@example.org",
    APITASK_MAIL_BACKGROUND=True, APITASK_TIMEOUT=0.2,
)
mail = flask_mail.Mail(app)
ApiTask(app)

begun = threading.Event()

@task_started.connect_via(app)
def note(app, **extra):
    begun.set()

with app.test_request_context():
    mail.send_message("hello", ["ada@example.org"], body="text")
    assert begun.wait(10)
"""

    with ScriptedServer() as server:
        server.fail(Stage.GREETING, Fault.SILENCE)

        with ChildProcess([sys.executable, "-c", script, f"{server.port}"]) as child:
            assert child.wait() == 0

    assert "past their deadline: 'flask_mail.send'" in child.output


def test_the_class_of_messages_may_be_mocked_too() -> None:
    """A test of a view mocks both, and looks at what was sent to."""
    app = Flask(__name__)
    app.config.update(MAIL_DEFAULT_SENDER="a@x.org", APITASK_MAIL_BACKGROUND=True)
    mail = Mail(app)
    ApiTask(app)

    @app.get("/")
    def index() -> str:
        mail.send(flask_mail.Message("hi", recipients=["b@x.org"]))
        return "ok"

    with mock.patch("flask_mail.Message") as message:
        with mock.patch("flask_mail.Mail.send") as send:
            assert app.test_client().get("/").text == "ok"

    send.assert_called_once_with(message.return_value)
