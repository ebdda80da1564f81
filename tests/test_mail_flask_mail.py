from __future__ import annotations

import contextlib
import email.errors
import gc
import logging
import smtplib
import subprocess
import sys
import threading
import time
import typing as t
from unittest import mock

import flask_mail
import pytest
from conftest import PATIENCE
from conftest import wait_until
from flask import current_app
from flask import Flask
from flask_mail import Attachment
from flask_mail import BadHeaderError
from flask_mail import Mail
from flask_mail import Message
from mail_time import unhurried
from mailbox_server import Mailbox
from smtp_servers import Fault
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import scoped
from flask_apitask import wait
from flask_apitask.exceptions import DeliveryError
from flask_apitask.exceptions import DeliveryUnknown
from flask_apitask.mail import sending
from flask_apitask.mail.flask_mail import BackgroundConnection

if t.TYPE_CHECKING:
    import collections.abc as cabc

# The modules that import Flask-Mail.
ADAPTERS = (
    "flask_apitask.mail",
    "flask_apitask.mail.changes",
    "flask_apitask.mail.flask_mail",
    "flask_apitask.mail.flask_mailman",
    "flask_apitask.mail.libraries",
    "flask_apitask.mail.mailman_rendering",
    "flask_apitask.mail.outbox",
    "flask_apitask.mail.rendering",
    "flask_apitask.mail.sending",
)
# Seconds that a mail server may be silent.
TIMEOUT = 5.0


@pytest.fixture
def inbox() -> cabc.Iterator[Mailbox]:
    """Return a mail server that runs for the length of a test."""
    with Mailbox() as mailbox:
        yield mailbox


class MailApp(t.NamedTuple):
    """An app that sends to the inbox, and its Flask-Mail."""

    app: Flask
    mail: Mail


class MailAppFactory(t.Protocol):
    """Make such an app; keywords are keys of its configuration."""

    def __call__(self, **config: t.Any) -> MailApp: ...


@pytest.fixture
def make_mail_app(inbox: Mailbox) -> MailAppFactory:
    """Return what makes an app that sends to the mail server."""

    def factory(**config: t.Any) -> MailApp:
        app = Flask(__name__)
        app.config.update(
            MAIL_SERVER="127.0.0.1",
            MAIL_PORT=inbox.port,
            MAIL_DEFAULT_SENDER="shop@example.org",
            APITASK_MAIL_BACKGROUND=True,
            APITASK_MAIL_KEEPALIVE=0,
        )
        app.config.update(config)
        mail = Mail(app)
        ApiTask(app)
        return MailApp(app, mail)

    return factory


def letter(subject: str = "hello", *recipients: str, **fields: t.Any) -> Message:
    """Make a message that can be sent."""
    return Message(subject, list(recipients or ["ann@example.org"]), "text", **fields)


def test_flag_off_leaves_flask_mail_untouched(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """With the flag off Flask-Mail has its own connection (behaviour 20)."""
    app, mail = make_mail_app(APITASK_MAIL_BACKGROUND=False)

    with app.test_request_context():
        mail.send(letter())
        assert inbox.subjects == ["hello"]
        assert type(mail.connect()) is flask_mail.Connection


def test_flag_off_does_not_import_flask_mail() -> None:
    """An app without the flag does not even load Flask-Mail (behaviour 20)."""
    code = (
        "import sys, flask, flask_apitask;"
        "flask_apitask.ApiTask(flask.Flask('x'));"
        "sys.exit('flask_mail' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE * 3)


def test_other_app_keeps_the_original(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """An app without the flag sends at once, beside one that has it (behaviour 20)."""
    make_mail_app()
    app, mail = make_mail_app(APITASK_MAIL_BACKGROUND=False)

    @app.get("/")
    def view() -> str:
        mail.send(letter())
        return str(len(inbox.messages))

    assert app.test_client().get("/").text == "1"


@pytest.mark.parametrize(
    "send",
    [
        lambda mail: mail.send(letter()),
        lambda mail: mail.send_message("hello", ["ann@example.org"], "text"),
        lambda mail: current_app.extensions["mail"].send(letter()),
        lambda mail: current_app.extensions["mail"].send_message(
            "hello", ["ann@example.org"], "text"
        ),
    ],
    ids=["send", "send_message", "extension_send", "extension_send_message"],
)
def test_every_way_to_send_is_rerouted(
    make_mail_app: MailAppFactory, inbox: Mailbox, send: cabc.Callable[[Mail], None]
) -> None:
    """A view goes on while its mail is sent, and waits at its end (behaviour 21)."""
    app, mail = make_mail_app()
    inbox.lock()

    @app.get("/")
    def view() -> str:
        send(mail)
        assert not inbox.messages
        inbox.unlock()
        return "done"

    assert app.test_client().get("/").text == "done"
    assert inbox.subjects == ["hello"]


@pytest.mark.parametrize("mail_first", [True, False])
def test_order_of_initialisation(inbox: Mailbox, mail_first: bool) -> None:
    """Mail and ApiTask can be set up in either order (behaviour 21)."""
    app = Flask(__name__)
    app.config.update(
        MAIL_PORT=inbox.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
        APITASK_MAIL_KEEPALIVE=0,
    )
    mail = Mail()

    for extension in (mail, ApiTask()) if mail_first else (ApiTask(), mail):
        extension.init_app(app)

    @app.get("/")
    def view() -> str:
        with mail.connect() as connection:
            assert type(connection).__name__ == BackgroundConnection.__name__
            connection.send(letter())

        return ""

    app.test_client().get("/")
    assert inbox.subjects == ["hello"]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"recipients": []}, AssertionError),
        ({"sender": None}, AssertionError),
        ({"subject": "a\r\nBcc: eve@example.org"}, BadHeaderError),
        ({"recipients": ["ann@example.org\nx"]}, BadHeaderError),
        ({"reply_to": "ann@example.org\nx"}, BadHeaderError),
        ({"cc": ["ann@example.org\nBcc: eve@example.org"]}, BadHeaderError),
        ({"cc": [("Ann\r\nBcc: eve@example.org", "ann@example.org")]}, BadHeaderError),
        ({"bcc": ["ann@example.org\rx"]}, BadHeaderError),
        ({"extra_headers": {"X-Note": "a\nBcc: eve@example.org"}}, BadHeaderError),
        ({"extra_headers": {"X-Note\n": "a"}}, BadHeaderError),
        ({"body": "\ud800"}, UnicodeEncodeError),
        ({"mail_options": ["SIZE=1\r\nRSET"]}, ValueError),
        ({"attachments": [Attachment("a\nBcc: x", "text/plain", "")]}, BadHeaderError),
        (
            {
                "attachments": [
                    Attachment("a", "text/plain", "", headers={"X": "a\nBcc: eve"})
                ]
            },
            BadHeaderError,
        ),
    ],
    ids=[
        "no recipients",
        "no sender",
        "subject",
        "recipient",
        "reply_to",
        "cc",
        "cc name",
        "bcc",
        "header value",
        "header name",
        "body",
        "option",
        "attachment",
        "attachment header",
    ],
)
def test_bad_message_is_refused_in_the_view(
    make_mail_app: MailAppFactory,
    inbox: Mailbox,
    message: dict[str, t.Any],
    error: type[Exception],
) -> None:
    """A bad message raises where it is sent, and queues nothing (behaviour 22)."""
    app, mail = make_mail_app(MAIL_DEFAULT_SENDER=None)
    fields = {
        "recipients": ["ann@example.org"],
        "sender": "shop@example.org",
        "body": "text",
    }

    with app.test_request_context():
        with pytest.raises(error):
            mail.send(Message(**(fields | message)))

        with open_scope() as scope, mail.connect() as connection:
            with pytest.raises(error):
                connection.send(Message(**(fields | message)))

        assert "queued=0 running=0" in repr(scope)

    assert not inbox.messages


def test_newline_in_the_envelope_sender_is_refused(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """The envelope's sender can't smuggle a command (behaviour 22)."""
    app, mail = make_mail_app()

    with app.test_request_context(), mail.connect() as connection:
        with pytest.raises(BadHeaderError):
            connection.send(letter(), envelope_from="a@example.org\r\nRSET")

    assert not inbox.messages


def test_message_is_delivered_as_it_was_sent(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A message that is changed and sent again arrives in both forms (behaviour 22)."""
    app, mail = make_mail_app()
    inbox.lock()

    @app.get("/")
    def view() -> str:
        message = letter("one", "ann@example.org")
        mail.send(message)
        message.subject = "two"
        message.recipients[:] = ["bob@example.org"]
        mail.send(message)
        message.recipients.clear()
        inbox.unlock()
        return ""

    with mail.record_messages() as outbox:
        app.test_client().get("/")

    assert sorted(zip(inbox.subjects, inbox.recipients, strict=True)) == [
        ("one", ["ann@example.org"]),
        ("two", ["bob@example.org"]),
    ]
    assert sorted((message.subject, message.recipients) for message in outbox) == [
        ("one", ["ann@example.org"]),
        ("two", ["bob@example.org"]),
    ]


def test_lazy_text_is_rendered_by_the_caller(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A lazy string is resolved in the thread of the caller (behaviour 22)."""
    app, mail = make_mail_app()
    caller = threading.current_thread()
    seen: list[threading.Thread] = []

    class Lazy:
        def __str__(self) -> str:
            seen.append(threading.current_thread())
            return "hallo"

        def __contains__(self, text: str) -> bool:
            return text in str(self)

    @app.get("/")
    def view() -> str:
        mail.send(letter(t.cast("str", Lazy())))
        return ""

    app.test_client().get("/")
    assert inbox.subjects == ["hallo"]
    assert set(seen) == {caller}


def test_connect_block_is_one_task_over_one_connection(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """The messages of a block arrive in order, over one connection (behaviour 23)."""
    app, mail = make_mail_app()
    inbox.lock()
    subjects = [str(number) for number in range(5)]

    @app.get("/")
    def view() -> str:
        with mail.connect() as connection:
            for subject in subjects:
                connection.send(letter(subject))

        assert not inbox.messages
        inbox.unlock()
        return ""

    app.test_client().get("/")
    assert inbox.subjects == subjects
    assert len({id(session) for session in inbox.sessions}) == 1


def test_connect_block_that_raises_delivers_what_was_sent(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """What a block sent before it raised is delivered (behaviour 23)."""
    app, mail = make_mail_app()

    @app.get("/")
    def view() -> str:
        with contextlib.suppress(LookupError), mail.connect() as connection:
            connection.send(letter())
            raise LookupError

        return ""

    app.test_client().get("/")
    assert inbox.subjects == ["hello"]


def test_without_a_scope_mail_is_sent_at_once(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """In a command mail is sent on the spot, and errors raise (behaviour 24)."""
    app, mail = make_mail_app()

    with app.app_context():
        mail.send(letter("one"))
        assert inbox.subjects == ["one"]

        with mail.connect() as connection:
            connection.send(letter("two"))
            assert inbox.subjects == ["one", "two"]
            connection.send(letter("three"))

        assert inbox.sessions[1] is inbox.sessions[2]
        inbox.refused.add("ann@example.org")

        with pytest.raises(smtplib.SMTPException) as caught:
            mail.send(letter())

    assert isinstance(caught.value, DeliveryError)
    assert "ann@" not in str(caught.value)


def test_without_requests_scope_mail_is_sent_at_once(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """With scopes only on demand, a plain view sends on the spot (behaviour 24)."""
    app, mail = make_mail_app(APITASK_ENABLED=False)

    @app.get("/plain")
    def plain() -> str:
        mail.send(letter())
        return str(len(inbox.messages))

    @app.get("/scoped")
    @scoped
    def in_scope() -> str:
        inbox.lock()
        mail.send(letter())
        sent = len(inbox.messages)
        inbox.unlock()
        return str(sent)

    assert app.test_client().get("/plain").text == "1"
    assert app.test_client().get("/scoped").text == "1"
    assert len(inbox.messages) == 2


def test_inside_a_task_mail_is_sent_at_once(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A task that sends mail has sent it when send() returns (behaviour 24)."""
    app, mail = make_mail_app(APITASK_MAX_WORKERS=1)
    inbox.refused.add("bob@example.org")

    def task() -> int:
        mail.send(letter())

        with pytest.raises(DeliveryError):
            mail.send(letter("no", "bob@example.org"))

        return len(inbox.messages)

    @app.get("/")
    def view() -> str:
        return str(run(task).result(PATIENCE))

    assert app.test_client().get("/").text == "1"


def test_after_the_scope_ended_mail_is_sent_at_once(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """Once its scope was shut down, a request sends on the spot (behaviour 24)."""
    app, mail = make_mail_app()

    with app.test_request_context(), open_scope() as scope:
        scope.shutdown()
        mail.send(letter())
        assert inbox.subjects == ["hello"]


@pytest.mark.parametrize("key", ["TESTING", "MAIL_SUPPRESS_SEND"])
def test_suppressed_mail_is_recorded_but_not_sent(
    make_mail_app: MailAppFactory, inbox: Mailbox, key: str
) -> None:
    """The outbox is complete when the client has its response (behaviour 25)."""
    app, mail = make_mail_app(**{key: True})

    @app.post("/")
    def view() -> str:
        mail.send(letter("one"))

        with mail.connect() as connection:
            connection.send(letter("two"))
            connection.send(letter("three"))

        return ""

    with mail.record_messages() as outbox:
        app.test_client().post("/")
        assert sorted(message.subject for message in outbox) == ["one", "three", "two"]

        with app.test_client() as client:
            client.post("/")
            assert len(outbox) == 6

    assert not inbox.messages


def test_email_dispatched_comes_once_and_after_delivery(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """The signal has the app, comes once per message, and for no refused one (25)."""
    app, mail = make_mail_app()
    inbox.refused.add("bob@example.org")
    dispatched: list[tuple[Flask, str, int]] = []

    def receiver(sender: Flask, message: Message, **_: t.Any) -> None:
        dispatched.append((sender, message.subject, len(inbox.messages)))

    @app.get("/")
    def view() -> str:
        mail.send(letter("refused", "bob@example.org"))
        wait()
        mail.send(letter("taken"))
        return ""

    with flask_mail.email_dispatched.connected_to(receiver):
        app.test_client().get("/")

    assert dispatched == [(app, "taken", 1)]


def test_receiver_that_fails_makes_no_failed_mail(
    make_mail_app: MailAppFactory, inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """A delivered mail is not reported as failed by its signal (behaviour 26)."""
    app, mail = make_mail_app()

    def receiver(sender: Flask, message: Message, **_: t.Any) -> None:
        raise LookupError

    with flask_mail.email_dispatched.connected_to(receiver):
        with app.test_request_context(), mail.connect() as connection:
            connection.send(letter("one"))
            connection.send(letter("two"))

    assert inbox.subjects == ["one", "two"]
    assert [record.getMessage() for record in caplog.records] == [
        "A receiver of the signal 'email-dispatched' failed."
    ] * 2


def test_max_emails_opens_a_new_connection(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """MAIL_MAX_EMAILS limits what goes over one connection (behaviour 25)."""
    app, mail = make_mail_app(MAIL_MAX_EMAILS=2)

    with app.test_request_context(), mail.connect() as connection:
        for number in range(5):
            connection.send(letter(str(number)))

    assert inbox.subjects == ["0", "1", "2", "3", "4"]
    assert len({id(session) for session in inbox.sessions}) == 3


def test_attachments_and_copies_arrive(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """Attachments, cc and bcc are those of the message (behaviour 25)."""
    app, mail = make_mail_app(MAIL_DEFAULT_SENDER=("Shop", "shop@example.org"))

    with app.test_request_context():
        message = letter(cc=["bob@example.org"], bcc=["cyd@example.org"], html="<p>")
        message.attach("note.txt", "text/plain", "attached")
        mail.send(message)

    [received] = inbox.messages
    assert inbox.recipients == [
        ["ann@example.org", "bob@example.org", "cyd@example.org"]
    ]
    assert "cyd" not in str(received)
    assert received["From"] == "Shop <shop@example.org>"
    assert [part.get_filename() for part in received.iter_attachments()][-1] == (
        "note.txt"
    )


def test_failures_of_a_block_are_one_error(
    make_mail_app: MailAppFactory, inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused messages are reported together, by Message-ID (behaviour 26)."""
    app, mail = make_mail_app()
    inbox.refused.add("bob@example.org")
    sent: list[Message] = []

    @app.get("/")
    def view() -> str:
        with mail.connect() as connection:
            for recipient in ["bob@example.org", "ann@example.org", "bob@example.org"]:
                sent.append(letter("hello", recipient))
                connection.send(sent[-1])

        return "done"

    assert app.test_client().get("/").text == "done"
    assert inbox.recipients == [["ann@example.org"]]
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.apitask_task == "flask_mail.send"  # type: ignore[attr-defined]
    assert "2 of 3 messages were not delivered" in caplog.text
    assert sent[0].msgId in caplog.text
    assert sent[1].msgId not in caplog.text
    assert sent[2].msgId in caplog.text
    assert "bob@" not in caplog.text


def test_one_failure_is_one_error_with_its_message_id(
    make_mail_app: MailAppFactory, inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused recipient is always reported, and no address is (behaviour 26)."""
    app, mail = make_mail_app()
    inbox.refused.add("bob@example.org")

    @app.get("/")
    def view() -> str:
        mail.send(message := letter("hello", "bob@example.org", "ann@example.org"))
        return message.msgId

    message_id = app.test_client().get("/").text
    assert inbox.recipients == [["ann@example.org"]]
    assert len(caplog.records) == 1
    assert message_id in caplog.text
    assert "550" in caplog.text
    assert "bob@" not in caplog.text


@pytest.mark.parametrize(
    ("fault", "error"),
    [(Fault.PERMANENT, DeliveryError), (Fault.DROP, DeliveryUnknown)],
)
def test_every_error_names_its_message(
    make_mail_app: MailAppFactory, fault: Fault, error: type[DeliveryError]
) -> None:
    """An error has the Message-ID, whoever raises it (behaviour 26)."""
    with ScriptedServer() as server:
        server.fail(Stage.DOT, fault)
        app, mail = make_mail_app(MAIL_PORT=server.port)

        with app.app_context(), pytest.raises(error) as caught:
            mail.send(message := letter())

    assert type(caught.value) is error
    assert caught.value.message_id == message.msgId
    assert f"{caught.value}".endswith(f" Message-ID: {message.msgId}")


@pytest.mark.parametrize(
    ("stage", "kept", "timeouts", "untried"),
    [
        (Stage.GREETING, False, 1, 3),
        (Stage.EHLO, False, 1, 3),
        (Stage.MAIL, False, 4, 0),
        (Stage.MAIL, True, 5, 0),
        (Stage.DOT, True, 4, 0),
    ],
)
def test_what_a_silent_server_costs_a_batch(
    make_mail_app: MailAppFactory,
    caplog: pytest.LogCaptureFixture,
    stage: Stage,
    *,
    kept: bool,
    timeouts: int,
    untried: int,
) -> None:
    """A batch costs one timeout if the server lets nobody in, else one per message."""
    with ScriptedServer() as server:
        app, mail = make_mail_app(
            MAIL_PORT=server.port,
            APITASK_MAIL_TIMEOUT=TIMEOUT,
            APITASK_MAIL_KEEPALIVE=30 * kept,
        )

        with app.app_context():
            mail.send(letter())

        server.fail(stage, *[Fault.SILENCE] * 5)

        with (
            unhurried(server) as waits,
            app.test_request_context(),
            mail.connect() as connection,
        ):
            for number in range(4):
                connection.send(letter(str(number)))

    assert len(waits) == timeouts
    assert max(waits) <= TIMEOUT
    assert server.connects == timeouts + (not kept)
    assert len(caplog.records) == 1
    assert "4 of 4 messages were not delivered" in caplog.text
    assert caplog.text.count("It was not attempted.") == untried


def test_what_a_batch_costs_that_gets_no_connection(
    make_mail_app: MailAppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch waits once for a connection, and not once per message."""
    app, mail = make_mail_app(APITASK_MAIL_CONNECTIONS=1, APITASK_MAIL_TIMEOUT=0.3)
    sent: list[Message] = []

    pool = app.extensions["apitask_mail"].pool(app.extensions["mail"])
    session = pool.acquire()
    began = time.monotonic()

    with (
        mock.patch.object(pool, "acquire", wraps=pool.acquire) as acquire,
        app.test_request_context(),
        mail.connect() as connection,
    ):
        for number in range(3):
            sent.append(letter(str(number)))
            connection.send(sent[-1])

    pool.release(session)
    assert acquire.call_count == 1
    assert time.monotonic() - began >= 0.3
    assert len(caplog.records) == 1
    assert "3 of 3 messages were not delivered" in caplog.text
    assert caplog.text.count("It was not attempted.") == 2
    assert all(message.msgId in caplog.text for message in sent)


@pytest.mark.parametrize("has_threads", [0, 1])
def test_uwsgi_without_threads_keeps_no_connection(
    make_mail_app: MailAppFactory,
    inbox: Mailbox,
    monkeypatch: pytest.MonkeyPatch,
    has_threads: int,
) -> None:
    """No connection is kept if no thread could close it in time."""
    monkeypatch.setattr(sending, "threads_enabled", lambda: bool(has_threads))
    app, mail = make_mail_app(APITASK_MAIL_KEEPALIVE=60)

    with app.app_context():
        mail.send(letter())

    if has_threads:
        assert len(inbox.transports) == 1
    else:
        wait_until(lambda: not inbox.transports)


def test_settings_that_changed_are_used(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A Mail that is set up again, as tests do, is followed."""
    app, mail = make_mail_app(MAIL_PORT=1)

    with app.app_context():
        with pytest.raises(DeliveryError):
            mail.send(letter())

        app.extensions["mail"].port = inbox.port
        mail.send(letter())
        mail.send(letter())

    assert len(inbox.messages) == 2


def test_suppressed_mail_is_not_rendered(make_mail_app: MailAppFactory) -> None:
    """What Flask-Mail would not render in a test is not rendered here."""
    app, mail = make_mail_app(TESTING=True)

    with app.test_request_context():
        mail.send(letter("nobody listens", "jörg@example.org"))

    with app.test_request_context(), mail.record_messages() as outbox:
        mail.send(letter("hello", "jörg@example.org"))

        with pytest.raises(BadHeaderError):
            mail.send(letter("hello\nBcc: eve@example.org"))

        app.extensions["mail"].suppress = False

        with pytest.raises(UnicodeEncodeError):
            mail.send(letter("hello", "jörg@example.org"))

    (message,) = outbox
    assert message.date is not None


def test_what_cannot_be_rendered(make_mail_app: MailAppFactory) -> None:
    """A header that Python itself refuses to write is a bad header."""
    app, mail = make_mail_app()

    class Broken(Message):
        def as_bytes(self) -> bytes:
            raise email.errors.MessageError

    with app.test_request_context(), pytest.raises(BadHeaderError):
        mail.send(Broken("hello", ["ann@example.org"], "text"))


def test_connection_sends_what_makes_a_message(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A connection has ``send_message()`` too, and counts messages."""
    app, mail = make_mail_app()

    with app.test_request_context(), mail.connect() as connection:
        connection.send_message("hello", ["ann@example.org"], "text")
        assert connection.num_emails == 1

    assert inbox.subjects == ["hello"]


@pytest.mark.parametrize("suppress", [False, True])
def test_what_is_set_as_the_host_of_a_connection_sends(
    make_mail_app: MailAppFactory, inbox: Mailbox, *, suppress: bool
) -> None:
    """A test's mock gets what Flask-Mail would give it, and the server nothing."""
    app, mail = make_mail_app(MAIL_SUPPRESS_SEND=suppress)
    name = "=?utf-8?b?w4TDnMOWIOKGkiDinJM=?="

    with mail.record_messages() as outbox, app.test_request_context():
        with mail.connect() as connection:
            message = letter("hello", "ÄÜÖ → ✓ <ann@example.org>")

            with mock.patch.object(connection, "host") as host:
                connection.send(message)

            host.sendmail.assert_called_once_with(
                "shop@example.org",
                [f"{name} <ann@example.org>"],
                message.as_bytes(),
                message.mail_options,
                message.rcpt_options,
            )
            connection.send(letter("past it"))
            assert connection.num_emails == 2

        with mail.connect() as connection:
            connection.host = host
            connection.send(letter())

        assert host.quit.call_count == 1

    assert len(outbox) == 3
    assert inbox.subjects == ([] if suppress else ["past it"])


def test_app_that_goes_takes_its_idle_connections_along(inbox: Mailbox) -> None:
    """An app may go while connections are kept for it; nobody can be warned of that."""
    app = Flask(__name__)
    app.config.update(
        MAIL_PORT=inbox.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
    )
    mail = Mail(app)
    ApiTask(app)

    with app.app_context():
        mail.send(letter())

    assert "idle=1" in repr(app.extensions["apitask_mail"].pool(app.extensions["mail"]))
    del app, mail
    gc.collect()


@pytest.mark.parametrize("suppress", [False, True])
def test_send_outside_the_block_is_refused(
    make_mail_app: MailAppFactory, inbox: Mailbox, *, suppress: bool
) -> None:
    """A message sent before or after a connect() block is refused, not forgotten."""
    app, mail = make_mail_app(MAIL_SUPPRESS_SEND=suppress)

    for context in (app.app_context(), app.test_request_context()):
        with context:
            connection = mail.connect()

            for _ in range(2):
                with pytest.raises(RuntimeError, match="Send inside the block"):
                    connection.send(letter())

                with connection:
                    pass


def test_connection_is_entered_again(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A connection may have several blocks, and one within another loses nothing."""
    app, mail = make_mail_app()

    with app.test_request_context():
        connection = mail.connect()

        for subject in ["one", "two"]:
            with connection:
                connection.send(letter(subject))

                with connection:
                    connection.send(letter(f"{subject} within"))

    assert sorted(inbox.subjects) == ["one", "one within", "two", "two within"]


def test_settings_that_are_text(make_mail_app: MailAppFactory, inbox: Mailbox) -> None:
    """Settings may be text or numbers, as environment variables bring them."""
    app, mail = make_mail_app(
        MAIL_MAX_EMAILS="2", MAIL_PORT=str(inbox.port), APITASK_MAIL_KEEPALIVE=30
    )

    with app.app_context():
        for number in range(5):
            mail.send(letter(str(number)))

        app.extensions["mail"].username = "shop"
        app.extensions["mail"].password = 12345678

        with pytest.raises(DeliveryError):
            mail.send(letter())

    assert inbox.subjects == ["0", "1", "2", "3", "4"]
    assert len({id(session) for session in inbox.sessions}) == 3


def test_former_settings_hold_for_what_was_sent_under_them(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A message goes to the server that was set when it was sent."""
    app, mail = make_mail_app()

    with Mailbox() as other, app.test_request_context(), open_scope():
        inbox.lock()
        mail.send(letter("one"))
        app.extensions["mail"].port = other.port
        mail.send(letter("two"))
        inbox.unlock()
        wait()
        assert inbox.subjects == ["one"]
        assert other.subjects == ["two"]


def test_suppressed_mail_is_recorded_at_once(make_mail_app: MailAppFactory) -> None:
    """In a test the outbox has the messages in the order in which they were sent."""
    app, mail = make_mail_app(TESTING=True)
    subjects = [str(number) for number in range(20)]

    with app.test_request_context(), mail.record_messages() as outbox:
        for subject in subjects:
            mail.send(letter(subject))

        assert [message.subject for message in outbox] == subjects


def test_receiver_that_sends_needs_no_second_connection(
    make_mail_app: MailAppFactory, inbox: Mailbox
) -> None:
    """A receiver of the signal may send mail, with one connection in all."""
    app, mail = make_mail_app(APITASK_MAIL_CONNECTIONS=1)

    def archive(sender: Flask, message: Message, **_: t.Any) -> None:
        if message.subject == "hello":
            mail.send(letter("copy", "archive@example.org"))

    with flask_mail.email_dispatched.connected_to(archive):
        with app.test_request_context():
            mail.send(letter())

    assert inbox.subjects == ["hello", "copy"]


def test_receiver_that_sends_in_a_block_without_a_scope(
    make_mail_app: MailAppFactory, inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """It is called once the connection is free again, even without a task."""
    app, mail = make_mail_app(APITASK_MAIL_CONNECTIONS=1)

    def archive(sender: Flask, message: Message, **_: t.Any) -> None:
        if message.subject == "hello":
            mail.send(letter("copy", "archive@example.org"))

    with flask_mail.email_dispatched.connected_to(archive):
        with app.app_context(), mail.connect() as connection:
            connection.send(letter())
            connection.send(letter("last"))

    assert inbox.subjects == ["hello", "copy", "last"]
    assert not caplog.records


@pytest.mark.parametrize("in_request", [True, False])
def test_an_app_that_lacks_its_apitask(
    make_mail_app: MailAppFactory,
    inbox: Mailbox,
    caplog: pytest.LogCaptureFixture,
    *,
    in_request: bool,
) -> None:
    """Mail that was meant for the background is sent on the spot, with one WARNING."""
    make_mail_app()
    app = Flask("lacking")
    app.config.update(
        MAIL_PORT=inbox.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
    )
    mail = Mail(app)

    for _ in range(2):
        with app.test_request_context() if in_request else app.app_context():
            mail.send(letter())

    assert inbox.subjects == ["hello", "hello"]
    assert [record.getMessage() for record in caplog.records] == [
        "A mail was sent in a request of 'lacking', which has no ApiTask, so nothing"
        " ran in the background. Create one with ApiTask(app), or call its"
        " init_app(app)."
    ] * in_request


@pytest.mark.parametrize("flag", [None, False, "false"])
def test_an_app_that_never_asked_for_us(
    make_mail_app: MailAppFactory,
    inbox: Mailbox,
    caplog: pytest.LogCaptureFixture,
    flag: object,
) -> None:
    """An app without the flag, and without ApiTask, is told nothing."""
    make_mail_app()
    app = Flask(__name__)
    app.config.update(MAIL_PORT=inbox.port, MAIL_DEFAULT_SENDER="shop@example.org")
    app.config["APITASK_MAIL_BACKGROUND"] = flag
    mail = Mail(app)

    with app.test_request_context():
        mail.send(letter())

    assert inbox.subjects == ["hello"]
    assert not caplog.records


def test_connection_outside_of_any_context_is_the_original(
    make_mail_app: MailAppFactory,
) -> None:
    """Without an app context, nothing is rerouted."""
    _, mail = make_mail_app(MAIL_SUPPRESS_SEND=True)

    assert type(mail.connect()) is flask_mail.Connection


def test_mail_of_another_app_is_left_alone(make_mail_app: MailAppFactory) -> None:
    """A Mail that belongs to another app than the current one is not rerouted."""
    app, _ = make_mail_app()
    _, mail = make_mail_app()

    with app.app_context():
        assert type(mail.connect()) is flask_mail.Connection


def test_unverified_tls_is_said_at_start_up(
    make_mail_app: MailAppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """APITASK_MAIL_TLS_VERIFY = False logs one warning."""
    make_mail_app(APITASK_MAIL_TLS_VERIFY=False)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "APITASK_MAIL_TLS_VERIFY is False" in record.getMessage()


def test_import_error_of_another_module_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a missing library is reported as missing."""
    for module in ADAPTERS:
        monkeypatch.delitem(sys.modules, module, raising=False)

    monkeypatch.setitem(sys.modules, "flask_apitask.mail.rendering", None)
    app = Flask(__name__)
    app.config["APITASK_MAIL_BACKGROUND"] = True

    with pytest.raises(ModuleNotFoundError, match=r"flask_apitask\.mail\.rendering"):
        ApiTask(app)
