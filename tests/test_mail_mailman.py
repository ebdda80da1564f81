from __future__ import annotations

import email.errors
import email.message
import email.mime.base
import logging
import smtplib
import ssl
import threading
import typing as t
from unittest import mock

import flask_mail
import pytest
from cryptography.hazmat.primitives import serialization
from flask import Flask
from mail_time import unhurried
from mailbox_server import Mailbox
from smtp_servers import Certificates
from smtp_servers import Fault
from smtp_servers import run_script
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import task_finished
from flask_apitask.exceptions import DeliveryError
from flask_apitask.mail import sending

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

flask_mailman = pytest.importorskip("flask_mailman")
smtp = pytest.importorskip("flask_mailman.backends.smtp")
# What we come in place of, and what comes in its place.
Original = smtp.EmailBackend
Ours = pytest.importorskip("flask_apitask.mail.flask_mailman").EmailBackend

OURS = "flask_apitask.mail.flask_mailman"


@pytest.fixture
def inbox() -> cabc.Iterator[Mailbox]:
    """Return a mail server that runs for the length of a test."""
    with Mailbox() as mailbox:
        yield mailbox


class MailApp(t.NamedTuple):
    """An app that sends in the background, and its Flask-Mailman."""

    app: Flask
    mail: t.Any


def make_app(port: int, mail_first: bool = True, **config: t.Any) -> MailApp:
    """Return an app that sends there."""
    app = Flask(__name__)
    app.config.update(
        MAIL_SERVER="127.0.0.1",
        MAIL_PORT=port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
        APITASK_MAIL_KEEPALIVE=0,
    )
    app.config.update(config)
    mail = flask_mailman.Mail()

    for extension in (mail, ApiTask()) if mail_first else (ApiTask(), mail):
        extension.init_app(app)

    return MailApp(app, mail)


def letter(subject: str = "hello", *to: str, **fields: t.Any) -> t.Any:
    """Make a message that can be sent."""
    return flask_mailman.EmailMessage(
        subject, "text", to=to or ["ann@example.org"], **fields
    )


def send_alternatives(mail: t.Any) -> int:
    """Send a message with all kinds of parts."""
    message = flask_mailman.EmailMultiAlternatives(
        "hello", "text", to=["ann@example.org"]
    )
    message.attach_alternative("<p>text</p>", "text/html")
    message.attach("note.txt", "a note", "text/plain")
    message.attach("dot.png", b"\x89PNG", "image/png")
    return t.cast("int", message.send())


WAYS: dict[str, cabc.Callable[[t.Any], int]] = {
    "send": lambda mail: letter().send(),
    "send_mail": lambda mail: mail.send_mail(
        "hello", "text", None, ["ann@example.org"], html_message="<p>text</p>"
    ),
    "send_mass_mail": lambda mail: mail.send_mass_mail(
        [("hello", "text", None, ["ann@example.org"])]
    ),
    "get_connection": lambda mail: mail.get_connection().send_messages([letter()]),
    "alternatives": send_alternatives,
}


@pytest.mark.parametrize("backend", [None, "smtp", f"{smtp.__name__}.EmailBackend"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_send_is_rerouted(
    inbox: Mailbox, way: str, backend: str | None
) -> None:
    """A view goes on while its mail is sent, and waits at its end."""
    app, mail = make_app(inbox.port, MAIL_BACKEND=backend)
    inbox.lock()

    @app.get("/")
    def view() -> str:
        sent = WAYS[way](mail)
        assert not inbox.messages
        inbox.unlock()
        return str(sent)

    assert app.test_client().get("/").text == "1"
    assert inbox.subjects == ["hello"]


@pytest.mark.parametrize("mail_first", [True, False])
def test_order_of_initialisation(inbox: Mailbox, mail_first: bool) -> None:
    """Mail and ApiTask can be set up in either order."""
    app, mail = make_app(inbox.port, mail_first)

    with app.app_context():
        assert type(mail.get_connection()) is Ours
        assert type(app.extensions["mailman"].get_connection()) is Ours


def test_parts_arrive(inbox: Mailbox) -> None:
    """Alternatives and attachments are delivered as they were given."""
    app, mail = make_app(inbox.port)

    with app.test_request_context():
        send_alternatives(mail)

    parts = inbox.messages[0].iter_parts()
    text, note, dot = t.cast("list[email.message.EmailMessage]", list(parts))
    kinds = [part.get_content_type() for part in text.iter_parts()]
    assert kinds == ["text/plain", "text/html"]
    assert note.get_content().strip() == "a note"
    assert dot.get_content() == b"\x89PNG"


def test_what_is_left_as_it_is(tmp_path: pathlib.Path) -> None:
    """With the flag off, and for another backend, Flask-Mailman is as it was."""
    app, mail = make_app(25, APITASK_MAIL_BACKGROUND=False)
    other, other_mail = make_app(25, MAIL_FILE_PATH=str(tmp_path))

    with app.test_request_context():
        assert type(mail.get_connection()) is Original

    with other.test_request_context():
        assert type(other_mail.get_connection("smtp")) is Original

        for name in ("console", "dummy", "file", "locmem"):
            other.extensions["mailman"].backend = name
            backend = type(other_mail.get_connection())
            assert backend.__module__ == f"flask_mailman.backends.{name}"

    with Flask("x").app_context(), pytest.raises(RuntimeError, match="not configured"):
        flask_mailman.Mail().get_connection()


@pytest.mark.parametrize("start", ["send", "success"])
def test_a_test_has_its_outbox(start: str) -> None:
    """With TESTING a mail is in the outbox when send() returns, whoever came first."""
    app, mail = make_app(25, mail_first=False, TESTING=True, APITASK_MAIL_START=start)

    @app.get("/")
    def view() -> str:
        letter().send()
        assert len(mail.outbox) == 1
        return ""

    mail.init_app(app)
    mail.state = app.extensions["mailman"]
    assert app.test_client().get("/").status_code == 200
    assert [message.subject for message in mail.outbox] == ["hello"]


def test_the_name_for_explicit_use(inbox: Mailbox) -> None:
    """Beside another backend, ours goes by its own name, with the flag on."""
    app, mail = make_app(inbox.port, MAIL_BACKEND="dummy")
    off, off_mail = make_app(
        inbox.port, MAIL_BACKEND=OURS, APITASK_MAIL_BACKGROUND=False
    )

    with app.test_request_context():
        assert letter("one").send() == 1
        assert letter("two", connection=mail.get_connection(OURS)).send() == 1

    assert inbox.subjects == ["two"]

    with off.app_context(), pytest.raises(RuntimeError) as caught:
        letter(connection=off_mail.get_connection()).send()

    assert str(caught.value) == (
        f"{OURS} sends in the background, but {__name__!r} has no ApiTask with"
        " APITASK_MAIL_BACKGROUND on. Turn it on, or set MAIL_BACKEND to 'smtp', which"
        " works with and without it."
    )


def test_app_without_apitask_is_told_so(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """The flag of an app that has no ApiTask has no effect, and one WARNING says so."""
    make_app(inbox.port)
    app = Flask("shop")
    app.config.update(MAIL_PORT=inbox.port, APITASK_MAIL_BACKGROUND=True)
    mail = flask_mailman.Mail(app)

    with app.test_request_context():
        assert type(mail.get_connection()) is Original
        assert type(mail.get_connection()) is Original

    assert len(caplog.records) == 1
    assert "A mail was sent in a request of 'shop', which has no ApiTask" in caplog.text


@pytest.mark.parametrize("background", [True, False])
def test_mail_of_another_app_is_left_alone(inbox: Mailbox, background: bool) -> None:
    """A Mail that belongs to another app than the current one is not rerouted."""
    app, _ = make_app(inbox.port, APITASK_MAIL_BACKGROUND=background)
    _, mail = make_app(inbox.port)
    bound = flask_mailman.Mail(make_app(inbox.port).app)
    assert type(bound.get_connection()) is Original

    with app.test_request_context():
        assert bound.send_mail("hello", "text", None, ["ann@example.org"]) == 1
        assert inbox.subjects == ["hello"]
        assert type(bound.get_connection()) is Original
        # This one belongs to whichever app is the current one.
        assert type(mail.get_connection()) is (Ours if background else Original)


@pytest.mark.parametrize("how", ["block", "send_messages", "send_mass_mail"])
def test_a_block_is_one_task_over_one_connection(inbox: Mailbox, how: str) -> None:
    """A block is delivered in order, by one task over one connection."""
    app, mail = make_app(inbox.port)
    subjects = [f"number {number}" for number in range(8)]
    names: list[str] = []

    def note(sender: Flask, name: str, **_: t.Any) -> None:
        names.append(name)

    with task_finished.connected_to(note, app), app.test_request_context():
        if how == "send_mass_mail":
            mail.send_mass_mail(
                (subject, "", None, ["ann@example.org"]) for subject in subjects
            )
        elif how == "send_messages":
            mail.get_connection().send_messages(list(map(letter, subjects)))
        else:
            with mail.get_connection() as connection:
                for subject in subjects:
                    assert letter(subject, connection=connection).send() == 1

                assert connection.open() is False
                assert not inbox.messages

    assert inbox.subjects == subjects
    assert len({id(session) for session in inbox.sessions}) == 1
    assert names == ["flask_mailman.send"]


def test_a_large_block_begins_before_its_end(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block holds no more than some megabytes, and keeps its order."""
    monkeypatch.setattr(sending, "BATCH", 1)
    app, mail = make_app(inbox.port)
    subjects = ["one", "two", "three"]

    with app.test_request_context(), mail.get_connection() as connection:
        for subject in subjects:
            letter(subject, connection=connection).send()

        assert inbox.subjects[:2] == subjects[:2]

    assert inbox.subjects == subjects


def test_a_connection_that_is_never_closed_loses_nothing(inbox: Mailbox) -> None:
    """After open() each message is on its way at once, in order."""
    app, mail = make_app(inbox.port)
    subjects = ["one", "two", "three"]

    with app.test_request_context():
        connection = mail.get_connection()
        assert connection.open() is True
        assert connection.open() is False

        for subject in subjects:
            letter(subject, connection=connection).send()

    assert inbox.subjects == subjects
    connection.close()
    connection.close()


@pytest.mark.parametrize("how", ["block", "open"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_large_block_gives_up_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
    silent: bool,
) -> None:
    """A server that can't be reached costs one timeout, silent or not."""
    monkeypatch.setattr(sending, "BATCH", 1)
    caplog.set_level(logging.INFO)

    with ScriptedServer() as server:
        app, mail = make_app(server.port)
        server.fail(Stage.GREETING, *[Fault.SILENCE] * 4)

        with unhurried(server) as waits, app.test_request_context(), open_scope():
            connection = mail.get_connection(fail_silently=silent)

            if how == "open":
                connection.open()

            with connection:
                for _ in range(4):
                    letter(connection=connection).send()

    assert server.connects == len(waits) == 1
    assert caplog.text.count("It was not attempted.") == 3
    assert {r.levelname for r in caplog.records} == {"INFO" if silent else "ERROR"}


@pytest.mark.parametrize("end", ["teardown", "close"])
@pytest.mark.parametrize("status", [200, 302, 400, 503])
def test_mail_that_waits_for_success(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture, end: str, status: int
) -> None:
    """Mail is delivered if the request has succeeded, and else dropped with an INFO."""
    app, mail = make_app(inbox.port, APITASK_MAIL_START="success", APITASK_WAIT=end)
    caplog.set_level(logging.INFO)

    @app.get("/")
    def view() -> tuple[str, int]:
        assert letter("one").send() == 1

        with mail.get_connection() as connection:
            assert connection.send_messages([letter("two"), letter("three")]) == 2

        assert run(lambda: letter("four").send()).result() == 1

        with pytest.raises(ValueError, match="newlines"):
            letter("a\nb").send()

        assert not inbox.messages
        return "", status

    response = app.test_client().get("/", buffered=True)
    assert response.status_code == status
    expected = ["four", "one", "three", "two"] if status < 400 else []
    assert sorted(inbox.subjects) == expected
    text = "Task 'flask_mailman.send' of GET / was dropped: the response has the status"
    told = [r.getMessage() for r in caplog.records if "drop" in r.getMessage()]
    assert told == ([] if expected else [f"{text} {status}."] * 3)


def test_open_waits_for_nothing_that_waits_for_success(inbox: Mailbox) -> None:
    """After open() the order is kept, with one thread, and whether closed or not."""
    app, mail = make_app(inbox.port, APITASK_MAIL_START="success", APITASK_POOL_SIZE=1)
    subjects = [str(number) for number in range(5)]

    @app.get("/")
    def view() -> str:
        connection = mail.get_connection()
        connection.open()

        for subject in subjects:
            letter(subject, connection=connection).send()

        with open_scope():
            # Its success comes first.
            letter("inner", connection=connection).send()
            assert not inbox.messages

        assert inbox.subjects == ["inner"]
        return ""

    assert app.test_client().get("/").status_code == 200
    assert inbox.subjects == ["inner", *subjects]


def test_a_large_block_is_held_until_success(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that would begin to deliver while it is open does not."""
    monkeypatch.setattr(sending, "BATCH", 1)
    app, mail = make_app(inbox.port, APITASK_MAIL_START="success")

    with app.app_context(), open_scope():
        with mail.get_connection() as connection:
            connection.send_messages([letter("one"), letter("two")])

        assert not inbox.messages

    assert inbox.subjects == ["one", "two"]

    with app.app_context():
        # Where there is no scope, it is sent at once.
        letter("three").send()
        assert inbox.subjects[2:] == ["three"]


def test_a_block_that_raises_delivers_what_was_sent(inbox: Mailbox) -> None:
    """What a block has sent before it raised is delivered."""
    app, mail = make_app(inbox.port)

    def send() -> None:
        with mail.get_connection() as connection:
            letter(connection=connection).send()
            raise ZeroDivisionError

    with app.test_request_context(), pytest.raises(ZeroDivisionError):
        send()

    assert inbox.subjects == ["hello"]


class Part(email.mime.base.MIMEBase):
    """An attachment that has a header of the caller's."""

    def __init__(self, name: str, value: str) -> None:
        super().__init__("text", "plain")
        self.set_payload("text")
        self[name] = value


BAD: list[dict[str, t.Any]] = [
    {"from_email": None},
    {"to": ["ann@example.org\nBcc: eve@example.org"]},
    {"cc": ["ann@example.org\rx"]},
    {"to": ["ann@exam\0ple.org"]},
    {"subject": "a\nBcc: eve@example.org"},
    {"subject": "a\vBcc: eve@example.org"},
    {"headers": {"X-Note": "a\nBcc: eve@example.org"}},
    {"headers": {"X-Note: a\nBcc": "eve@example.org"}},
    {"headers": {"X-Note: a\fBcc": "eve@example.org"}},
    {"headers": {"X Note": "a"}},
    {"attachments": [("a\nBcc: eve", b"", "image/png")]},
    {"attachments": [Part("X-Note", "a\r\nBcc: eve@example.org")]},
    {"attachments": [Part("X-Note", "a\u2028Bcc: eve@example.org")]},
    {"body": "\ud800"},
]


BAD_NAMES = [f"{number} {next(iter(fields))}" for number, fields in enumerate(BAD)]


@pytest.mark.parametrize("fields", BAD, ids=BAD_NAMES)
def test_bad_message_is_refused_in_the_view(
    inbox: Mailbox, fields: dict[str, t.Any]
) -> None:
    """A bad message raises where it is sent, and queues nothing."""
    app, _ = make_app(inbox.port, MAIL_DEFAULT_SENDER=None)
    fields = {"from_email": "shop@example.org", "to": ["ann@example.org"]} | fields

    with app.test_request_context(), open_scope() as scope:
        for fail_silently in (False, True):
            with pytest.raises(ValueError, match=r"."):
                flask_mailman.EmailMessage(**fields).send(fail_silently)

        assert "queued=0 running=0" in repr(scope)

    assert not inbox.messages


def test_bad_header_that_python_finds(
    inbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that only rendering finds is the same error."""
    app, _ = make_app(inbox.port)
    error = email.errors.HeaderParseError("an embedded header")
    refuse = mock.Mock(side_effect=error)
    monkeypatch.setattr("flask_mailman.message.MIMEMixin.as_bytes", refuse)

    with app.app_context(), pytest.raises(flask_mailman.BadHeaderError, match="embed"):
        letter().send()


def test_message_is_delivered_as_it_was_sent(inbox: Mailbox) -> None:
    """It is rendered in the caller, lazy texts too, and may be changed at once."""
    app, mail = make_app(inbox.port)
    threads: list[threading.Thread] = []

    class Lazy:
        def __str__(self) -> str:
            threads.append(threading.current_thread())
            return "grüße"

    inbox.lock()

    with app.test_request_context():
        message = letter(t.cast("str", Lazy()), "Jörg <ann@bücher.example>")
        message.send()
        message.subject, message.to = "two", ["bob@example.org"]
        message.send()
        message.to.clear()
        assert message.send() == 0
        assert mail.get_connection().send_messages([]) == 0
        assert mail.get_connection().send_messages([message]) == 0
        inbox.unlock()

    assert sorted(zip(inbox.subjects, inbox.recipients, strict=True)) == [
        ("grüße", ["ann@xn--bcher-kva.example"]),
        ("two", ["bob@example.org"]),
    ]
    assert set(threads) == {threading.current_thread()}


def test_long_and_foreign_headers_are_folded(inbox: Mailbox) -> None:
    """A fold in a header, or an encoded name, does not count as a line break."""
    app, _ = make_app(inbox.port)
    subject = "Grüße " * 40 + "end"

    with app.test_request_context():
        message = letter(subject, *[f"a{n}@example.org" for n in range(40)])
        message.attach("größe.png", b"\x89PNG", "image/png")
        message.from_email = "Die Größte <shop@example.org>"
        message.extra_headers["References"] = " ".join(["<a@example.org>"] * 40)
        assert message.send() == 1

    (arrived,) = inbox.messages
    # Flask-Mailman itself begins with a fold.
    assert arrived["Subject"].strip() == subject
    assert arrived["From"].addresses[0].display_name == "Die Größte"
    assert [part.get_filename() for part in arrived.iter_attachments()] == ["größe.png"]
    assert len(inbox.recipients[0]) == 40


@pytest.mark.parametrize("where", ["app", "task", "block"])
def test_without_a_scope_it_is_sent_at_once(inbox: Mailbox, where: str) -> None:
    """Outside of a request and in a task send() delivers, and errors raise."""
    app, mail = make_app(inbox.port)
    inbox.refused.add("bob@example.org")

    def send(connection: t.Any = None) -> int:
        assert letter("one", connection=connection).send() == 1
        assert inbox.subjects == ["one"]

        with pytest.raises(DeliveryError, match="550"):
            letter("two", "bob@example.org", connection=connection).send()

        with pytest.raises(smtplib.SMTPException):
            mail.get_connection().send_messages([letter("2", "bob@example.org")] * 2)

        silent = mail.get_connection(fail_silently=True)
        messages = [letter("2", "bob@example.org"), letter("three")]
        return t.cast("int", silent.send_messages(messages))

    if where == "task":
        with app.test_request_context():
            assert run(send).result() == 1
    elif where == "block":
        with app.app_context(), mail.get_connection() as connection:
            assert send(connection) == 1
    else:
        with app.app_context():
            assert send() == 1

    assert inbox.subjects == ["one", "three"]


def test_a_failure_is_one_error_record(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    """What can't be delivered leaves the response alone and is logged once."""
    app, _ = make_app(inbox.port)
    inbox.refused.add("bob@example.org")

    @app.get("/")
    def view() -> str:
        return str(letter("x", "bob@example.org").send())

    assert app.test_client().get("/").text == "1"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], DeliveryError)
    assert record.exc_info[1].message_id
    assert "flask_mailman.send" in record.getMessage()
    assert "bob@example.org" not in caplog.text


@pytest.mark.parametrize("fault", [Stage.GREETING, Stage.DATA])
def test_fail_silently_is_no_error(
    caplog: pytest.LogCaptureFixture, fault: Stage
) -> None:
    """With ``fail_silently`` a failure is logged at INFO, not ERROR."""
    caplog.set_level(logging.INFO)

    with ScriptedServer() as server:
        app, _ = make_app(server.port)
        server.fail(fault, *[Fault.PERMANENT] * 2)

        with app.test_request_context():
            assert letter().send(fail_silently=True) == 1

    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "not delivered (fail_silently is on): " in record.getMessage()


def test_fail_silently_without_a_logger(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an app's logger can't be had, the failure is still told and not raised."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Flask, "logger", property(mock.Mock(side_effect=LookupError)))

    with ScriptedServer() as server:
        app, _ = make_app(server.port)
        server.fail(Stage.DATA, Fault.PERMANENT)

        with app.app_context():
            assert letter().send(fail_silently=True) == 0

    (record,) = caplog.records
    assert record.name == app.name
    assert "not delivered (fail_silently is on): " in record.getMessage()


def test_an_unknown_encoding() -> None:
    """It is the same error as in Flask-Mailman, and not one about line breaks."""
    app, _ = make_app(25)

    with app.app_context():
        message = letter()
        message.encoding = "ütf-8"

        with pytest.raises(email.errors.CharsetError):
            message.send()


def test_its_own_timeout_and_options() -> None:
    """MAIL_TIMEOUT is in place of APITASK_MAIL_TIMEOUT; options go to the server."""
    with ScriptedServer() as server, unhurried(server):
        app, mail = make_app(server.port, MAIL_TIMEOUT=0.3)
        server.fail(Stage.GREETING, Fault.SILENCE)

        with app.app_context():
            with pytest.raises(
                DeliveryError, match=r"more than 0\.3 s \(MAIL_TIMEOUT\)"
            ):
                letter().send()

            server.fail(Stage.GREETING, Fault.SILENCE)

            with pytest.raises(DeliveryError, match=r"more than 0\.2 s"):
                letter(connection=mail.get_connection(timeout="0.2")).send()

            with pytest.raises(ValueError, match=r"^MAIL_TIMEOUT is 0, but must be"):
                letter(connection=mail.get_connection(timeout=0)).send()

            app.extensions["mailman"].mail_options = ["BODY=8BITMIME\r\nRSET"]

            with pytest.raises(ValueError, match="an option"):
                letter().send()

    with pytest.raises(ValueError, match=r"^MAIL_TIMEOUT is 'soon', but must be"):
        make_app(25, MAIL_TIMEOUT="soon")


@pytest.mark.parametrize("kind", ["MAIL_USE_TLS", "MAIL_USE_SSL"])
def test_client_certificate(tmp_path: pathlib.Path, kind: str) -> None:
    """A server that asks for a certificate gets the one of MAIL_SSL_CERTFILE."""
    certificates = Certificates(tmp_path)
    issued = certificates.authority.issue_cert("client.example")
    certfile, keyfile = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(certfile)
    issued.private_key_pem.write_to_path(keyfile)
    context = certificates.context("localhost")
    context.load_verify_locations(certificates.cafile)
    context.verify_mode = ssl.CERT_REQUIRED
    config: dict[str, t.Any] = {"MAIL_SERVER": "localhost", kind: True}
    config["APITASK_MAIL_TLS_VERIFY"] = certificates.cafile
    files: dict[str, t.Any] = {
        "MAIL_SSL_CERTFILE": certfile,
        "MAIL_SSL_KEYFILE": keyfile,
    }

    with ScriptedServer(tls=context, implicit=kind == "MAIL_USE_SSL") as server:
        app, _ = make_app(server.port, **config, **files)
        bare, _ = make_app(server.port, **config)

        with app.app_context():
            assert letter().send() == 1

        with bare.app_context(), pytest.raises(DeliveryError):
            letter().send()

    assert len(server.taken) == 1


@pytest.mark.parametrize("mail_first", [True, False])
def test_flags_that_are_text(inbox: Mailbox, mail_first: bool) -> None:
    """Two texts that mean no are not two flags that are on."""
    flags: dict[str, t.Any] = {"MAIL_USE_TLS": "false", "MAIL_USE_SSL": "0"}
    app, mail = make_app(inbox.port, mail_first=mail_first, **flags)

    with app.app_context():
        assert letter().send() == 1

        with pytest.raises(ValueError, match="MAIL_USE_SSL is 'maybe'"):
            mail.get_connection(use_ssl="maybe")

    assert inbox.subjects == ["hello"]


def test_certificate_that_is_of_no_use(tmp_path: pathlib.Path) -> None:
    """An encrypted, lone or invalid key raises in the view, and never prompts."""
    certificates = Certificates(tmp_path)
    issued = certificates.authority.issue_cert("client.example")
    certfile, keyfile = str(tmp_path / "cert.pem"), tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certfile)
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    keyfile.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    app, mail = make_app(25, MAIL_USE_TLS=True)

    def send(**files: t.Any) -> None:
        letter(connection=mail.get_connection(**files)).send()

    with app.app_context():
        for files in ({"ssl_certfile": certfile}, {"ssl_certfile": "missing.pem"}):
            with pytest.raises(ValueError, match=r"MAIL_SSL_KEYFILE.* can't be loaded"):
                send(**files)

        with pytest.raises(ValueError, match="the key must not be encrypted"):
            send(ssl_certfile=certfile, ssl_keyfile=str(keyfile))

        with pytest.raises(ValueError, match="Set MAIL_SSL_CERTFILE"):
            send(ssl_keyfile=str(keyfile))


@pytest.mark.parametrize(
    "target", ["flask_mailman.backends.smtp.EmailBackend.send_messages", "smtplib.SMTP"]
)
@pytest.mark.parametrize("backend", ["smtp", Original, OURS, Ours], ids=str)
def test_a_patch_is_what_sends(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture, target: str, backend: t.Any
) -> None:
    """A test's patch of the backend, or of smtplib, is used, with one WARNING."""
    app, mail = make_app(inbox.port, MAIL_BACKEND=backend)

    with app.test_request_context():
        with mock.patch(target) as patched:
            letter().send()
            assert patched.called
            patched.reset_mock()

            if backend in {OURS, Ours}:
                letter(connection=mail.get_connection(backend)).send()
            else:
                letter().send()

            assert patched.called

        assert type(mail.get_connection()) is Ours

    assert not inbox.messages
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("Flask-Mailman was changed: ")


def test_both_libraries_on_one_app(inbox: Mailbox) -> None:
    """Flask-Mail and Flask-Mailman send side by side, over the same connections."""
    app, _ = make_app(inbox.port, APITASK_MAIL_CONNECTIONS=1, APITASK_MAIL_KEEPALIVE=0)
    mail = flask_mail.Mail(app)

    @app.get("/")
    def view() -> str:
        with mail.connect() as connection:
            for number in range(3):
                letter(f"mailman {number}").send()
                message = flask_mail.Message(f"mail {number}", ["ann@example.org"])
                connection.send(message)

        return ""

    assert app.test_client().get("/").status_code == 200
    assert len(inbox.messages) == 6

    with app.app_context():
        pool = app.extensions["apitask_mail"].pool(app.extensions["mail"])
        backend = flask_mailman.Mail(app).get_connection()
        assert backend._make_block(ends=True)._pool is pool

    own = [subject for subject in inbox.subjects if subject.startswith("mail ")]
    assert own == ["mail 0", "mail 1", "mail 2"]


def test_flask_mail_comes_only_if_it_is_used() -> None:
    """Flask-Mail, which changes how Python encodes text, is not imported for nothing.

    If it is imported after all, after the set-up, it is rerouted too.
    """
    shown = run_script(
        """
import sys
import flask_mailman
from flask import Flask
from flask_apitask import ApiTask

app = Flask("x")
app.config["APITASK_MAIL_BACKGROUND"] = True
ApiTask(app)
flask_mailman.Mail(app)

@app.get("/")
def view():
    if "flask_mail" in sys.modules:
        return type(app.extensions["mail"].connect()).__name__
    return type(app.extensions["mailman"].get_connection()).__module__

print(app.test_client().get("/").text)
print("flask_mail" in sys.modules)
app._got_first_request = False
import flask_mail
flask_mail.Mail(app)
print(app.test_client().get("/").text)
"""
    )
    assert shown.split() == [OURS, "False", "BackgroundConnection"]


def test_each_library_works_alone() -> None:
    """Neither library needs the other one to be installed."""
    shown = run_script(
        """
import sys
from flask import Flask
from flask_apitask import ApiTask

for missing in ("flask_mail", "flask_mailman"):
    for name in [name for name in sys.modules if name.startswith("flask_apitask.mail")]:
        del sys.modules[name]

    sys.modules[missing] = None
    app = Flask("x")
    app.config["APITASK_MAIL_BACKGROUND"] = True
    ApiTask(app)
    print(f"flask_apitask.mail.{missing}" in sys.modules)
    del sys.modules[missing]
"""
    )
    assert shown.split() == ["False", "False"]
