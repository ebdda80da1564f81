from __future__ import annotations

import base64
import gc
import logging
import re
import ssl
import traceback
import typing as t
import weakref

import pytest
import trustme
from flask import Flask
from flask_mail import Mail
from flask_mail import Message
from mail_time import Clock
from mail_time import unhurried
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import ApiTask
from flask_apitask.exceptions import DeliveryError
from flask_apitask.mail import flask_mail
from flask_apitask.mail.pool import ConnectionPool
from flask_apitask.mail.rendering import render
from flask_apitask.mail.replies import explain
from flask_apitask.mail.replies import mask
from flask_apitask.mail.replies import Reply
from flask_apitask.mail.replies import show

if t.TYPE_CHECKING:
    from flask_apitask.mail.envelope import Envelope

USER = ("shop-user", "pa55-word")


def send(pool: ConnectionPool, *recipients: str) -> None:
    """Send one message."""
    with pool.connection() as connection:
        connection.send(make_envelope(*recipients))


def refuse(
    stage: Stage, answer: bytes, *recipients: str, **settings: t.Any
) -> tuple[DeliveryError, str]:
    """Have a message refused, and return the error, and its text after the server."""
    with ScriptedServer(user=USER) as server:
        server.fail(stage, *[answer + b"\r\n"] * 20)
        pool = ConnectionPool(server.settings(timeout=5.0, **settings))

        # A server that refuses temporarily is tried again.
        with pytest.MonkeyPatch.context() as patch:
            Clock(patch)

            with pytest.raises(DeliveryError) as caught:
                send(pool, *recipients)

            pool.close_idle()

        return caught.value, f"{caught.value}".replace(f"{pool.settings}", "SERVER")


LOG_IN = {"MAIL_USERNAME", "MAIL_PASSWORD"}
RELAY = {*LOG_IN, "MAIL_SERVER"}
SENDER = {"MAIL_DEFAULT_SENDER"}
TLS = {"MAIL_USE_TLS"}
AT_ONCE = {"APITASK_MAIL_CONNECTIONS"}
END = "end of message"

# What servers say: Postfix, Exim and Sendmail by their sources, Exchange, Office 365,
# Gmail (support.google.com/a/answer/3726730), Amazon SES ("SMTP response codes") and
# SendGrid ("SMTP errors and troubleshooting") by their documentation; RFC 3463, 3207,
# 4954, 1870 and 5321 where they name an example. What it is, and the keys to look at.
REPLIES: list[tuple[str, str, str, set[str]]] = [
    # Too many connections
    (END, "432 4.3.2 Concurrent connections limit exceeded.", "at once", AT_ONCE),
    (
        *(END, "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded"),
        *("at once", AT_ONCE),
    ),
    ("greeting", "450 4.7.0 Too many concurrent connections", "at once", AT_ONCE),
    ("AUTH", "454 4.7.0 Too many connections", "at once", AT_ONCE),
    ("AUTH", "432 4.7.12 A password transition is needed", "log-in was", set()),
    # TLS
    ("MAIL", "530 5.7.0 Must issue a STARTTLS command first", "encrypted", TLS),
    ("MAIL", "451 5.7.3 STARTTLS is required to send mail", "encrypted", TLS),
    (
        "AUTH",
        "538 5.7.11 Encryption required for AUTH",
        "encrypted",
        TLS,
    ),
    ("MAIL", "554 5.7.10 Encryption needed", "encrypted", TLS),
    (END, "554 5.7.1 Message rejected: encrypted attachment", "message was", set()),
    (END, "554 encryption is required", "message was", set()),
    ("RCPT", "550 5.7.1 TLS required by recipient domain", "message was", set()),
    ("STARTTLS", "454 4.7.0 TLS not available", "STARTTLS was", set()),
    # Log-in
    ("MAIL", "530 5.7.0 Authentication required", "log-in is required", LOG_IN),
    ("MAIL", "530 Authentication required", "log-in is required", LOG_IN),
    ("MAIL", "530 5.7.1 Client was not authenticated", "log-in is required", LOG_IN),
    (
        "MAIL",
        "530 5.7.57 SMTP; Client was not authenticated to send anonymous mail",
        "log-in is required",
        LOG_IN,
    ),
    (
        "RCPT",
        "550 SMTP AUTH is required for message submission on port 587",
        "log-in is required",
        LOG_IN,
    ),
    (
        "RCPT",
        "550 Please turn on SMTP Authentication in your mail client",
        "log-in is required",
        LOG_IN,
    ),
    (
        "RCPT",
        "553 5.7.1 <ada@example.com>: Sender address rejected: not logged in",
        "log-in is required",
        LOG_IN,
    ),
    (
        "MAIL",
        "550 Cannot receive from this address: Unauthenticated senders not allowed",
        "log-in is required",
        LOG_IN,
    ),
    ("AUTH", "535 5.7.8 Error: authentication failed", "password was", LOG_IN),
    ("AUTH", "535 Incorrect authentication data", "password was", LOG_IN),
    ("AUTH", "535 5.7.3 Authentication unsuccessful", "password was", LOG_IN),
    ("AUTH", "535 Authentication Credentials Invalid", "password was", LOG_IN),
    (
        "AUTH",
        "534-5.7.9 Application-specific password required",
        "application-specific password is required",
        {"MAIL_PASSWORD"},
    ),
    ("AUTH", "535 5.7.139 SMTP is disabled for this tenant", "log-in was", set()),
    ("AUTH", "525 5.7.13 User account disabled", "log-in was", set()),
    ("AUTH", "503 5.5.1 Error: authentication not enabled", "log-in was", set()),
    ("AUTH", "504 5.7.4 Unrecognized authentication type", "log-in was", set()),
    ("AUTH", "534 5.7.9 Authentication mechanism is too weak", "log-in was", set()),
    ("AUTH", "454 4.7.0 Temporary authentication failure", "log-in was", set()),
    ("AUTH", "451 Authentication failed: Maximum credits exceeded", "log-in", set()),
    # Who may send for a domain
    ("MAIL", "550 5.7.23 SPF fail: unauthenticated sender", "domain failed", set()),
    ("MAIL", "550 SPF fail: unauthenticated sender", "domain failed", set()),
    ("RCPT", "550 5.7.1 SPF: the host is not authorized", "domain failed", set()),
    (
        END,
        "550-5.7.26 This mail is blocked because the sender is unauthenticated",
        "domain failed",
        set(),
    ),
    (
        END,
        "550 5.7.515 Access denied, sending domain does not meet the required"
        " authentication level",
        "domain failed",
        set(),
    ),
    ("MAIL", "550 5.7.1 Not authorized", "message was", set()),
    # Relaying
    ("RCPT", "554 5.7.1 <x@y.example>: Relay access denied", "not relayed", RELAY),
    # It is so by default, where another server has a 554: defer_unauth_destination.
    ("RCPT", "454 4.7.1 <x@y.example>: Relay access denied", "not relayed", RELAY),
    ("RCPT", "550 relay not permitted", "not relayed", RELAY),
    ("RCPT", "550 5.7.1 <x@y.example>... Relaying denied", "not relayed", RELAY),
    ("RCPT", "550 5.7.54 SMTP; Unable to relay recipient", "not relayed", RELAY),
    ("RCPT", "550 5.7.1 Unable to relay", "not relayed", RELAY),
    ("RCPT", "550 5.7.64 TenantAttribution", "not relayed", RELAY),
    ("RCPT", "451 4.7.1 The relay is busy", "message was", set()),
    ("RCPT", "454 Peak SMTP relay limit exceeded", "message was", set()),
    ("RCPT", "554 5.7.1 Listed as an open relay", "message was", set()),
    # Size
    ("MAIL", "552 5.3.4 Message size exceeds fixed limit", "too large", set()),
    ("MAIL", "552 message size exceeds fixed maximum message size", "too large", set()),
    (END, "552-5.2.3 Your message exceeded size limits", "too large", set()),
    (END, "552 Message size exceeds maximum permitted", "too large", set()),
    (END, "552 5.3.4 Error: message file too big", "too large", set()),
    (END, "554 Message is too large", "too large", set()),
    ("RCPT", "552 5.2.2 Mailbox full", "mailbox is full", set()),
    ("RCPT", "452-4.2.2 The inbox is out of storage space", "mailbox is full", set()),
    (END, "552 mailbox full", "mailbox is full", set()),
    (END, "552 Mailbox size limit exceeded", "mailbox is full", set()),
    ("MAIL", "452 4.3.1 Insufficient system storage", "message was", set()),
    (END, "552 5.7.0 Blocked: a potential security issue", "message was", set()),
    (END, "552 exceeded storage allocation", "message was", set()),
    # Lines
    (END, "500 5.6.0 Line too long (see RFC5321 4.5.3.1.6)", "line that is", set()),
    (END, "550 maximum allowed line length is 998 octets", "line that is", set()),
    (END, "552 message has lines too long for transport", "line that is", set()),
    # The sender
    ("MAIL", "550 5.1.0 no sender of ours", "sender was", SENDER),
    ("MAIL", "553 no", "sender was", SENDER),
    (
        *(END, "501 Mail from address must be same as authorization user."),
        *("sender was", SENDER),
    ),
    (END, "553 Mail from must equal authorized user", "sender was", SENDER),
    (END, "553 Relaying disallowed as root@example.com", "sender was", SENDER),
    ("MAIL", "550 Sender rejected", "sender was", SENDER),
    ("MAIL", "550 Unauthenticated sender rejected", "message was", set()),
    ("MAIL", "550 blocked using a list of networks", "message was", set()),
    ("RCPT", "550 5.1.8 <>: Sender address rejected: no domain", "sender was", SENDER),
    (
        "RCPT",
        "553 5.7.1 Sender address rejected: not owned by user",
        "sender was",
        SENDER,
    ),
    ("RCPT", "550 Sender verify failed", "sender was", SENDER),
    (END, "550 5.7.60 SMTP; no permissions to send as this sender", "sender", SENDER),
    (END, "554 5.2.0 Exception:SendAsDenied", "sender was", SENDER),
    (END, "550 No match with a verified Sender Identity", "sender was", SENDER),
    ("MAIL", "403 not authorized to send from that address", "sender was", SENDER),
    ("MAIL", "451 4.1.8 Sender address rejected: later", "message was", set()),
    ("MAIL", "554 5.7.1 Client host rejected: Access denied", "message was", set()),
    ("MAIL", "550 5.4.5 Daily sending quota exceeded", "message was", set()),
    ("MAIL", "503 5.5.1 Bad sequence of commands", "message was", set()),
    # Anything else
    ("greeting", "554 5.7.1 your network is listed", "connection was", set()),
    ("EHLO", "504 5.5.2 need a fully-qualified name", "EHLO was", set()),
    ("RCPT", "550 5.1.1 User unknown", "message was", set()),
    ("RCPT", "450 4.2.0 Greylisted", "message was", set()),
    ("DATA", "554 5.5.1 Error: no valid recipients", "message was", set()),
    (END, "550 5.7.1 this is spam", "message was", set()),
    (END, "554 Message rejected: Email address is not verified", "message", set()),
    (END, "454 Throttling failure: Maximum sending rate exceeded", "message", set()),
]


@pytest.mark.parametrize(("stage", "reply", "meaning", "keys"), REPLIES)
def test_what_a_reply_means(
    stage: str, reply: str, meaning: str, keys: set[str]
) -> None:
    """The text says what failed, if it is for now, and no key but the right ones."""
    text = " ".join(explain(stage, Reply(int(reply[:3]), reply[4:].encode())))
    assert meaning in text
    assert set(re.findall(r"[A-Z_]*MAIL_[A-Z_]+", text)) == keys
    is_temporary = reply[0] == "4" and reply[:3] != "403" and reply[4] != "5"
    assert ("is temporary" in text) is is_temporary


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
            b"454 4.7.0 try later",
            "The log-in was refused by SERVER: 454 4.7.0 try later. A 4xx reply is"
            " temporary: the server may accept the message later.",
        ),
        (
            Stage.MAIL,
            b"530 5.7.0 Authentication required",
            "A log-in is required by SERVER: 530 5.7.0 Authentication required."
            " Set MAIL_USERNAME and MAIL_PASSWORD.",
        ),
        (
            Stage.DATA,
            b"554 5.5.1 no",
            "The message was refused by SERVER: 554 5.5.1 no.",
        ),
        (
            Stage.DOT,
            b"552 too big",
            "The message is too large for SERVER: 552 too big. Link to a file instead"
            " of attaching it.",
        ),
    ],
)
def test_what_was_refused_and_what_to_do(
    stage: Stage, answer: bytes, text: str
) -> None:
    """The text has the server's words, and the exception has them as data."""
    error, shown = refuse(stage, answer)
    assert shown == text
    assert (error.smtp_code, error.smtp_error) == (int(answer[:3]), answer[4:])
    assert error.recipients == {}
    names = {Stage.DOT: "end of message", Stage.GREETING: "greeting"}
    assert error.stage == names.get(stage, stage.value)


def test_recipients_for_different_reasons() -> None:
    """Each remedy is given once, in the order of the replies."""
    with ScriptedServer() as server:
        replies = [b"550 5.1.1 no", b"450 4.2.0 later", b"550 Sender verify failed"]
        server.fail(Stage.RCPT, *[reply + b"\r\n" for reply in [*replies, *replies]])
        pool = ConnectionPool(server.settings())
        addresses = [
            f"{name}@example.com" for name in ("ada", "bob", "cat", "dan", "eve", "flo")
        ]

        with pytest.raises(DeliveryError) as caught:
            send(pool, *addresses)

        pool.close_idle()

    assert f"{caught.value}".endswith(
        ": 550 5.1.1 no (2 times), 450 4.2.0 later (2 times), 550 Sender verify failed"
        " (2 times). A 4xx reply is temporary: the server may accept the message later."
        " Check MAIL_DEFAULT_SENDER."
    )


def test_recipients_that_were_refused() -> None:
    """Refused recipients are data, with code and words, as in smtplib."""
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
        "All 2 recipients were refused by SERVER: 554 5.7.1 <address>: Relay access"
        " denied (2 times). If the server relays for users who log in: Set"
        " MAIL_USERNAME and MAIL_PASSWORD. If not, check MAIL_SERVER."
    )


def test_some_recipients_that_were_refused() -> None:
    """The others are not in the data, and got the message."""
    with ScriptedServer() as server:
        server.fail(Stage.RCPT, None, b"550 5.1.1 who?\r\n")
        pool = ConnectionPool(server.settings())

        with pytest.raises(DeliveryError) as caught:
            send(pool, "ada@example.com", "bob@example.com")

        pool.close_idle()

    assert caught.value.recipients == {"bob@example.com": (550, b"5.1.1 who?")}
    assert server.taken[0].recipients == ("ada@example.com",)


@pytest.mark.parametrize(
    ("stage", "fault", "hint"),
    [
        (Stage.GREETING, Fault.SILENCE, "(usually 465), set MAIL_USE_SSL."),
        (Stage.GREETING, Fault.DROP, "(usually 465), set MAIL_USE_SSL."),
        # It has answered, so it does not wait for TLS.
        (Stage.GREETING, b"421 4.3.2 later\r\n", "accept the message later."),
        (Stage.EHLO, Fault.SILENCE, "more than 0.2 s (APITASK_MAIL_TIMEOUT)."),
        (Stage.EHLO, Fault.DROP, "failed at EHLO: the server closed it."),
    ],
)
def test_which_key_to_look_at_when_a_connection_fails(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, fault: Fault | bytes, hint: str
) -> None:
    """A failed connection names the keys that may be wrong, and has no reply."""
    with ScriptedServer() as server:
        server.fail(stage, *[fault] * 20)
        pool = ConnectionPool(server.settings(timeout=0.2))
        Clock(monkeypatch)

        with unhurried(server), pytest.raises(DeliveryError) as caught:
            send(pool)

    assert f"{caught.value}".endswith(hint)
    assert caught.value.smtp_code == (421 if isinstance(fault, bytes) else None)


def test_tls_on_the_wrong_port() -> None:
    """A handshake with a server that does not speak TLS names the ports."""
    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(use_ssl=True))

        with pytest.raises(DeliveryError) as caught:
            send(pool)

    assert caught.value.stage == "TLS"
    assert "465 is usual for MAIL_USE_SSL, 587 for MAIL_USE_TLS" in f"{caught.value}"


def test_a_greeting_that_is_cut_off_inside_of_tls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With MAIL_USE_SSL on, the advice is not to set it."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    with ScriptedServer(tls=context, implicit=True) as server:
        server.fail(Stage.GREETING, *[Fault.DROP] * 20)
        settings = server.settings(use_ssl=True, tls_verify=False, timeout=5.0)
        pool = ConnectionPool(settings)
        Clock(monkeypatch)

        with pytest.raises(DeliveryError) as caught:
            send(pool)

    assert f"{caught.value}".endswith(" failed at the greeting: the server closed it.")


def encode(text: str) -> str:
    """Encode as servers and clients do."""
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("5.1.1 <ada@example.com>: no", "5.1.1 <address>: no"),
        ('"ada b"@example.com is gone', "<address> is gone"),
        ("to ada@bücher.example.", "to <address>"),
        ("to 'o'hara@example.com'", "to '<address>'"),
        ("for <ada@[192.0.2.1]>", "for <address>"),
        ("see https://example.com/?id=ada%40example.com", "see https:<address>"),
        ("failed for shop-user", "failed for <hidden>"),
        ("SHOP-USER unknown", "<hidden> unknown"),
        ("shop-user2 is another", "shop-user2 is another"),
        ("you said pa55-word", "you said <hidden>"),
        ("bob... User unknown", "<hidden>... User unknown"),
        (f"refused: {encode('Password:')}", "refused: <base64>"),
        (f"{encode(chr(0) + 'shop-user')} is wrong", "<base64> is wrong"),
        (encode("\xff\xfe" * 12), "<base64>"),
        (
            f"{encode('shop')} or {encode('pw')} is wrong",
            "<base64> or <base64> is wrong",
        ),
        ("key= is missing", "key= is missing"),
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


def test_a_long_reply_is_cut() -> None:
    """The time to search one for causes and addresses grows with its square."""
    assert len(Reply(550, b"x" * 60_000).text) == len("550 ") + 2_000
    assert mask(f"{encode('shop' * 1_000)} tail", []) == "<base64>"


def test_a_status_is_no_secret() -> None:
    """A user that is called 1 does not hide the status code, but is hidden."""
    reply = Reply(550, b"5.1.1 user 1 unknown")
    assert show([reply], ["1@example.com"]) == "550 5.1.1 user <hidden> unknown"


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
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault | bytes,
    number: int,
) -> None:
    """Of ours the traceback has the delivering function, and nothing below it."""
    with ScriptedServer(user=USER) as server:
        server.fail(Stage.AUTH, *[fault] * 20)
        user = {"MAIL_USERNAME": USER[0], "MAIL_PASSWORD": USER[1]}
        app, mail = make_app(server, **user)
        Clock(monkeypatch)

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


def test_an_error_holds_no_message(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message is free once its delivery has failed, even if the error is kept."""
    rendered: list[weakref.ref[Envelope]] = []

    def keep(*args: t.Any) -> Envelope:
        envelope = render(*args)
        rendered.append(weakref.ref(envelope))
        return envelope

    monkeypatch.setattr(flask_mail, "render", keep)

    with ScriptedServer() as server:
        server.fail(Stage.DOT, Fault.DROP)
        app, mail = make_app(server)

        with app.test_request_context():
            mail.send(Message("x", ["ada@example.com"], "x"))

    gc.collect()
    (record,) = caplog.records
    assert record.exc_info is not None
    assert [envelope() for envelope in rendered] == [None]


@pytest.mark.parametrize("text", ["false", "F", "n", "0", " no ", "off", "", "None"])
def test_flags_that_are_text(text: str) -> None:
    """A word for "no" turns the flag off."""
    flags = dict.fromkeys(["MAIL_USE_TLS", "MAIL_USE_SSL", "MAIL_SUPPRESS_SEND"], text)

    with ScriptedServer() as server:
        app, mail = make_app(server, **flags)

        with app.app_context():
            mail.send(Message("x", ["ada@example.com"], "x"))

    assert len(server.taken) == 1


@pytest.mark.parametrize("text", ["true", "T", "y", "1", "on", "yes"])
def test_flags_that_are_yes(text: str) -> None:
    """A word for "yes" turns the flag on."""
    with ScriptedServer() as server:
        app, mail = make_app(server, MAIL_USE_TLS=text)

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


WRONG = [
    ("MAIL_PORT", "abc", "a port from 1 to 65535"),
    ("MAIL_PORT", 65_536, "a port from 1 to 65535"),
    ("MAIL_PORT", -1, "a port from 1 to 65535"),
    ("MAIL_MAX_EMAILS", "x", "a whole number, or None for no limit"),
    ("MAIL_MAX_EMAILS", -1, "a whole number, or None for no limit"),
    ("MAIL_DEBUG", "x", "True, False, or a whole number of at least 0"),
    ("MAIL_DEBUG", None, "True, False, or a whole number of at least 0"),
    ("MAIL_USE_TLS", "maybe", "True or False"),
    ("MAIL_USE_SSL", "maybe", "True or False"),
    ("MAIL_SUPPRESS_SEND", "maybe", "True or False"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG)
def test_a_key_of_flask_mail_that_is_wrong(
    key: str, value: object, allowed: str
) -> None:
    """It is an error at start-up, in either order, if mail is rerouted."""
    text = f"^{re.escape(f'{key} is {value!r}, but must be {allowed}.')}$"
    app = Flask(__name__)
    app.config.update({key: value}, APITASK_MAIL_BACKGROUND=True)

    with pytest.raises(ValueError, match=text):
        ApiTask(app)

    assert "apitask" not in app.extensions
    app = Flask(__name__)
    app.config["APITASK_MAIL_BACKGROUND"] = True
    ApiTask(app)
    app.config[key] = value

    with pytest.raises(ValueError, match=text):
        Mail(app)

    other = Flask(__name__)
    other.config[key] = value
    ApiTask(other)


@pytest.mark.parametrize("port", [None, "", "0"])
def test_keys_that_are_left_empty(port: object) -> None:
    """An environment variable that is not set, or is empty, is no mistake."""
    app = Flask(__name__)
    app.config.update(MAIL_PORT=port, MAIL_MAX_EMAILS=port, MAIL_SERVER=None)
    app.config.update(APITASK_MAIL_BACKGROUND=True, MAIL_DEFAULT_SENDER="a@example.org")
    mail = Mail(app)
    ApiTask(app)
    text = "MAIL_SERVER is None, but must be the name of a mail server."

    with app.app_context(), pytest.raises(ValueError, match=text):
        mail.send(Message("x", ["ada@example.com"], "x"))
