from __future__ import annotations

import base64
import logging
import traceback
import typing as t

import pytest
from flask import Flask
from flask_mail import Mail
from flask_mail import Message
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import ApiTask
from flask_apitask.exceptions import DeliveryError
from flask_apitask.mail.pool import ConnectionPool
from flask_apitask.mail.replies import mask
from flask_apitask.mail.replies import Reply
from flask_apitask.mail.replies import show

USER = ("shop-user", "pa55-word")


def refuse(
    stage: Stage, answer: bytes, *recipients: str, **settings: t.Any
) -> tuple[DeliveryError, str]:
    """Have a message refused, and return the error, and its text after the server."""
    with ScriptedServer(user=USER) as server:
        server.fail(stage, *[answer + b"\r\n"] * max(1, len(recipients)))
        pool = ConnectionPool(server.settings(**settings))

        with pytest.raises(DeliveryError) as caught, pool.connection() as connection:
            connection.send(make_envelope(*recipients))

        pool.close_idle()
        return caught.value, f"{caught.value}".replace(f"{pool.settings}", "SERVER")


@pytest.mark.parametrize(
    ("stage", "answer", "text"),
    [
        (
            Stage.GREETING,
            b"554 5.7.1 your network is listed",
            "The connection was refused by SERVER: 554 5.7.1 your network is listed.",
        ),
        (
            Stage.AUTH,
            b"535 5.7.139 SMTP is disabled for this tenant, see kb-4711.",
            "The user name or the password was refused by SERVER: 535 5.7.139 SMTP is"
            " disabled for this tenant, see kb-4711. Check MAIL_USERNAME and"
            " MAIL_PASSWORD.",
        ),
        (
            Stage.AUTH,
            b"454 4.7.0 try later",
            "The log-in was refused by SERVER: 454 4.7.0 try later.",
        ),
        (
            Stage.MAIL,
            b"530 5.7.0 Authentication required",
            "A log-in is missing, says SERVER: 530 5.7.0 Authentication required."
            " Set MAIL_USERNAME and MAIL_PASSWORD.",
        ),
        (
            Stage.MAIL,
            b"530 5.7.0 Must issue a STARTTLS command first",
            "An encrypted connection is asked for by SERVER: 530 5.7.0 Must issue a"
            " STARTTLS command first. Set MAIL_USE_TLS.",
        ),
        (
            Stage.MAIL,
            b"552 5.3.4 Message size exceeds fixed limit",
            "The message is too large for SERVER: 552 5.3.4 Message size exceeds fixed"
            " limit. Link to a file in place of attaching it.",
        ),
        (
            Stage.MAIL,
            b"550 5.1.0 <root@example.com> is no sender of ours",
            "The sender was refused by SERVER: 550 5.1.0 <address> is no sender of"
            " ours. Check MAIL_DEFAULT_SENDER.",
        ),
        (
            Stage.MAIL,
            b"451 4.3.0 later",
            "The sender was refused by SERVER: 451 4.3.0 later.",
        ),
        (
            Stage.DATA,
            b"554 5.5.1 no",
            "The message was refused by SERVER: 554 5.5.1 no.",
        ),
        (
            Stage.DOT,
            b"552 too big",
            "The message is too large for SERVER: 552 too big. Link to a file in place"
            " of attaching it.",
        ),
        (
            Stage.DOT,
            b"500 5.6.0 Line too long (see RFC5321 4.5.3.1.6)",
            "The message has a line that is too long for SERVER: 500 5.6.0 Line too"
            " long (see RFC5321 4.5.3.1.6). Break the lines of its text and HTML: 998"
            " characters is the limit of SMTP.",
        ),
        (
            Stage.DOT,
            b"554 5.7.1 Relay access denied",
            "The message is not relayed by SERVER: 554 5.7.1 Relay access denied. If"
            " the server relays for those who log in: Set MAIL_USERNAME and"
            " MAIL_PASSWORD. Else check MAIL_SERVER.",
        ),
        (
            Stage.DOT,
            b"550 5.7.1 this is spam",
            "The message was refused by SERVER: 550 5.7.1 this is spam.",
        ),
    ],
)
def test_what_was_refused_and_what_to_do(
    stage: Stage, answer: bytes, text: str
) -> None:
    """The text says what failed, with the server's words, and which key to look at."""
    error, shown = refuse(stage, answer)
    assert shown == text
    assert (error.smtp_code, error.smtp_error) == (int(answer[:3]), answer[4:])
    assert error.recipients == {}
    names = {Stage.DOT: "end of message", Stage.GREETING: "greeting"}
    assert error.stage == names.get(stage, stage.value)


def test_recipients_that_were_refused() -> None:
    """Who was refused is data, with code and words, as smtplib has it."""
    error, shown = refuse(
        Stage.RCPT,
        b"554 5.7.1 <x@y.example>: Relay access denied",
        "ada@example.com",
        "bob@example.com",
    )
    reply = (554, b"5.7.1 <x@y.example>: Relay access denied")
    assert error.recipients == {"ada@example.com": reply, "bob@example.com": reply}
    assert (error.stage, error.smtp_code, error.smtp_error) == ("RCPT", None, None)
    assert shown == (
        "Every recipient of 2 was refused by SERVER: 554 5.7.1 <address>: Relay access"
        " denied (2 times). If the server relays for those who log in: Set"
        " MAIL_USERNAME and MAIL_PASSWORD. Else check MAIL_SERVER."
    )


def test_some_recipients_that_were_refused() -> None:
    """The others are not in the data, and got the message."""
    with ScriptedServer() as server:
        server.fail(Stage.RCPT, None, b"550 5.1.1 who?\r\n")
        pool = ConnectionPool(server.settings())

        with pytest.raises(DeliveryError) as caught, pool.connection() as connection:
            connection.send(make_envelope("ada@example.com", "bob@example.com"))

        pool.close_idle()

    assert caught.value.recipients == {"bob@example.com": (550, b"5.1.1 who?")}
    assert server.taken[0].recipients == ("ada@example.com",)


@pytest.mark.parametrize(
    ("stage", "fault", "hint"),
    [
        (Stage.GREETING, Fault.SILENCE, "more than 0.2 s (APITASK_MAIL_TIMEOUT)."),
        (Stage.GREETING, Fault.DROP, "mostly 465, set MAIL_USE_SSL."),
        (Stage.EHLO, Fault.SILENCE, "more than 0.2 s (APITASK_MAIL_TIMEOUT)."),
        (Stage.EHLO, Fault.DROP, "failed at EHLO: the server closed it."),
    ],
)
def test_which_key_to_look_at_when_a_connection_fails(
    stage: Stage, fault: Fault, hint: str
) -> None:
    """A failed connection names the keys that may be wrong, and has no reply."""
    with ScriptedServer() as server:
        server.fail(stage, fault)
        pool = ConnectionPool(server.settings(timeout=0.2))

        with pytest.raises(DeliveryError) as caught, pool.connection() as connection:
            connection.send(make_envelope())

    assert hint in f"{caught.value}"
    assert caught.value.smtp_code is None


def test_tls_on_the_wrong_port() -> None:
    """A handshake with a server that does not speak TLS names the ports."""
    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(use_ssl=True))

        with pytest.raises(DeliveryError) as caught, pool.connection() as connection:
            connection.send(make_envelope())

    assert caught.value.stage == "TLS"
    assert "465 is usual for MAIL_USE_SSL, 587 for MAIL_USE_TLS" in f"{caught.value}"


def encode(text: str) -> str:
    """Encode as servers and clients do."""
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("5.1.1 <ada@example.com>: no", "5.1.1 <address>: no"),
        ('"ada b"@example.com is gone', "<address> is gone"),
        ("to ada@bücher.example.", "to <address>"),
        ("failed for shop-user", "failed for <hidden>"),
        ("SHOP-USER unknown", "<hidden> unknown"),
        ("shop-user2 is another", "shop-user2 is another"),
        ("you said pa55-word", "you said <hidden>"),
        ("bob... User unknown", "<hidden>... User unknown"),
        (f"refused: {encode('Password:')}", "refused: <base64>"),
        (f"{encode(chr(0) + 'shop-user')} is wrong", "<base64> is wrong"),
        (encode("\xff\xfe" * 12), "<base64>"),
        (
            "https://example.com/?p=BadCredentials",
            "https://example.com/?p=BadCredentials",
        ),
        ("temporarily unavailable password", "temporarily unavailable password"),
        ("two\nlines\x1b[2J", "two lines?[2J"),
        ("x" * 1_000, "x" * 300),
    ],
)
def test_what_is_masked(words: str, shown: str) -> None:
    """No address, user name, password or base64 of a server's words gets into a log."""
    assert mask(" ".join(words.split()), [*USER, "bob@example.com", ""]) == shown


def test_replies_are_counted() -> None:
    """Equal replies are one, whatever addresses they quote."""
    replies = [Reply(550, b"<a@x.example> no"), Reply(550, b"<b@x.example> no")]
    assert show(replies, []) == "550 <address> no (2 times)"
    assert show([Reply(250, b"\xff")], []) == "250 \ufffd"


class MailApp(t.NamedTuple):
    """An app with its mail rerouted."""

    app: Flask
    mail: Mail


def make_app(server: ScriptedServer, **config: t.Any) -> MailApp:
    """Make an app that sends to a server."""
    app = Flask(__name__)
    app.config.update(
        MAIL_SERVER="localhost",
        MAIL_PORT=server.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
        APITASK_MAIL_KEEPALIVE=0,
    )
    app.config.update(config)
    mail = Mail(app)
    ApiTask(app)
    return MailApp(app, mail)


def test_an_error_of_several_messages() -> None:
    """The error of a block has those of its messages, and all recipients of them."""
    with ScriptedServer() as server:
        app, mail = make_app(server)
        server.fail(Stage.RCPT, b"550 1\r\n", None, b"551 3\r\n")
        caught: list[BaseException | None] = []
        messages: list[Message] = []

        with app.test_request_context():
            with mail.connect() as connection:
                for name in "abc":
                    messages.append(Message("x", [f"{name}@example.com"], "x"))
                    connection.send(messages[-1])

            block = connection._block  # type: ignore[attr-defined]
            caught.append(block._delivery.exception())

    (error,) = caught
    assert isinstance(error, DeliveryError)
    assert [failure.recipients for failure in error.failures] == [
        {"a@example.com": (550, b"1")},
        {"c@example.com": (551, b"3")},
    ]
    assert error.recipients == {
        "a@example.com": (550, b"1"),
        "c@example.com": (551, b"3"),
    }
    assert error.failures[1].message_id == messages[2].msgId


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.PERMANENT, b"421 enough\r\n"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_short_traceback(
    caplog: pytest.LogCaptureFixture, fault: Fault | bytes, number: int
) -> None:
    """Of ours the traceback has the delivering function, and nothing below it."""
    with ScriptedServer(user=USER) as server:
        server.fail(Stage.AUTH, *[fault] * 5)
        app, mail = make_app(server, MAIL_USERNAME=USER[0], MAIL_PASSWORD=USER[1])

        with app.test_request_context(), mail.connect() as connection:
            for _ in range(number):
                connection.send(Message("x", ["ada@example.com"], "x"))

    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    frames = traceback.extract_tb(record.exc_info[2])
    ours = [frame.name for frame in frames if "flask_apitask/mail/" in frame.filename]
    assert ours == ["deliver"]
    assert "During handling" not in caplog.text
    assert "direct cause" not in caplog.text


@pytest.mark.parametrize("text", ["false", "False", "0", " no ", "off", "", "None"])
def test_flags_that_are_text(text: str) -> None:
    """A word for no is no."""
    with ScriptedServer() as server:
        app, mail = make_app(server, MAIL_USE_TLS=text, MAIL_USE_SSL=text)

        with app.app_context():
            mail.send(Message("x", ["ada@example.com"], "x"))

    assert len(server.taken) == 1


def test_flags_that_are_yes() -> None:
    """Any other word is yes."""
    with ScriptedServer() as server:
        app, mail = make_app(server, MAIL_USE_TLS="true")

        with app.app_context(), pytest.raises(DeliveryError, match="STARTTLS is not"):
            mail.send(Message("x", ["ada@example.com"], "x"))


def test_both_kinds_of_tls() -> None:
    """Both flags are an error at start-up that names them and their values."""
    text = "MAIL_USE_TLS is True and MAIL_USE_SSL is 'on', but only one can be"
    both = {"MAIL_USE_TLS": True, "MAIL_USE_SSL": "on"}

    with ScriptedServer() as server:
        with pytest.raises(ValueError, match=text):
            make_app(server, **both)

        app, _ = make_app(server)
        app.config.update(both)

        with pytest.raises(ValueError, match=text):
            Mail(app)

        # Not ours, so nothing of it is ours to say.
        other = Flask(__name__)
        other.config.update(both)
        assert Mail(other).use_ssl == "on"
