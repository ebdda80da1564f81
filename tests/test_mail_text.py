from __future__ import annotations

import collections
import contextlib
import email
import email.errors
import random
import smtplib
import typing as t

import flask_mail
import pytest
from flask import Flask
from flask_mail import Attachment
from flask_mail import BadHeaderError
from flask_mail import Mail
from flask_mail import Message
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from flask_apitask import ApiTask
from flask_apitask.mail import rendering

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.mail.envelope import Envelope

# What people paste, what they write, and what they try.
PIECES = [
    *("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\t", " "),
    *("\r", "\n", "\r\n", "\r\n ", "\0", "\ud800", "\u200f", "\u202e", "\ufeff"),
    *("✉", "ü", "\U0001f600", "a", "Welcome", "Doe, Ada", '"', "<", "@", ";", "=?"),
    *("Bcc: eve@example.org", ":", "--", "X: y", "Подтверждение " * 6),
]
texts = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
addresses = st.one_of(
    st.just("ada@example.org"),
    st.tuples(texts, st.just("ada@example.org")),
    st.builds("{} <ada@example.org>".format, texts),
)
attachments = st.builds(
    lambda name, note: Attachment(name, "text/plain", "x", headers={"X-Note": note}),
    texts,
    texts,
)
fields = st.fixed_dictionaries(
    {"recipients": st.lists(addresses, min_size=1, max_size=2)},
    optional={
        "subject": texts,
        "sender": addresses,
        "cc": st.lists(addresses, max_size=1),
        "reply_to": addresses,
        "extra_headers": st.fixed_dictionaries({"X-Note": texts}),
        "attachments": st.lists(attachments, max_size=2),
        "body": texts,
        "html": texts,
    },
)


class Sent(t.NamedTuple):
    """What would be handed in."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes


class Keeper:
    """What Flask-Mail sends with, as far as smtplib does not refuse it."""

    def sendmail(
        self, sender: str, recipients: cabc.Iterable[str], content: bytes, *_: object
    ) -> None:
        paths = [smtplib.quoteaddr(path) for path in (sender, *recipients)]

        for path in paths:
            path.encode("ascii")

            if "\r" in path or "\n" in path:
                raise ValueError(path)

        # Nobody gets it twice.
        self.sent = Sent(paths[0], tuple(dict.fromkeys(paths[1:])), content)


def send_plain(mail: Mail, message: Message) -> Sent | Exception:
    """Do as Flask-Mail does."""
    random.seed(1)
    connection = flask_mail.Connection(mail.state)  # type: ignore[arg-type]
    connection.host = keeper = Keeper()  # type: ignore[assignment]

    try:
        connection.send(message)
    except Exception as error:
        return error

    return keeper.sent


def send_ours(message: Message) -> Sent | Exception:
    """Do as this package does."""
    random.seed(1)

    try:
        rendering.check(message)
        envelope: Envelope = rendering.render(message)
    except Exception as error:
        return error

    return Sent(
        f"<{envelope.sender}>",
        tuple(f"<{recipient}>" for recipient in envelope.recipients),
        envelope.content,
    )


def is_sound(message: Message, content: bytes) -> bool:
    """Tell whether a message has the headers and the parts that it was given."""
    parsed = email.message_from_bytes(content)
    names = ["content-type", "mime-version", "from", "to", "date", "message-id"]
    names += [] if parsed.is_multipart() else ["content-transfer-encoding"]
    names += ["subject"] * bool(message.subject) + ["cc"] * bool(message.cc)
    names += ["reply-to"] * bool(message.reply_to)
    names += [name.lower() for name in message.extra_headers or {}]
    found = collections.Counter(map(str.lower, parsed))
    parts = [part for part in parsed.walk() if not part.is_multipart()]
    attached = [part for part in parts if "Content-Disposition" in part]
    expected = ["content-disposition", "content-transfer-encoding", "content-type"]
    expected += ["mime-version", "x-note"]
    return (
        found == collections.Counter(names)
        and len(attached) == len(message.attachments)
        and all(sorted(map(str.lower, part)) == expected for part in attached)
        and not any(part.defects for part in parsed.walk())
    )


@pytest.fixture(scope="module")
def mail() -> Mail:
    """Make a Mail of an app that has it rerouted."""
    app = Flask(__name__)
    app.config.update(
        MAIL_DEFAULT_SENDER="shop@example.org", APITASK_MAIL_BACKGROUND=True
    )
    extension = Mail(app)
    ApiTask(app)

    return extension


@contextlib.contextmanager
def context(mail: Mail) -> cabc.Iterator[None]:
    """Be in that app."""
    assert mail.app is not None

    with mail.app.app_context():
        yield


@settings(max_examples=400, deadline=None)
@given(given=fields)
@example({"recipients": ["ada@example.org"], "subject": "one\u2028two"})
@example({"recipients": ["ada@example.org"], "subject": "a\x0bBcc: eve@example.org"})
@example({"recipients": ["ada@example.org"], "extra_headers": {"X-Note": "a\x1cb"}})
@example({"recipients": [("A\x0bBcc: eve", "ada@example.org")], "body": "\x0c"})
@example({"recipients": ['"\0 <ada@example.org>']})
def test_the_same_as_plain_flask_mail(mail: Mail, given: dict[str, t.Any]) -> None:
    """What Flask-Mail delivers unharmed is delivered; what adds a header is refused."""
    with context(mail):
        message = Message(**given)
        message.date = 0.0
        plain = send_plain(mail, message)
        ours = send_ours(message)

    if isinstance(plain, Exception):
        assert isinstance(ours, Exception)
    elif isinstance(ours, Exception):
        breaks = {"\r", "\n"} & set("".join(all_texts(message)))
        addresses = [message.sender, *message.send_to]
        null = "\0" in "".join(flask_mail.sanitize_addresses(addresses))
        assert breaks or null or not is_sound(message, plain.content), ours
    else:
        assert ours == plain
        assert is_sound(message, ours.content)


@pytest.mark.parametrize("name", ["cc", "bcc", "attachments", "rcpt_options"])
def test_lists_that_are_none(mail: Mail, name: str) -> None:
    """What somebody sets to None after the message was made is an empty list."""
    with context(mail):
        message = Message("hello", ["ada@example.org"], body="text")
        message.date = 0.0
        setattr(message, name, None)
        assert isinstance(plain := send_plain(mail, message), Sent)
        assert send_ours(message) == plain


def all_texts(message: Message) -> cabc.Iterator[str]:
    """Yield what must not have a line break, though Flask-Mail lets it through."""
    for address in (message.sender, message.reply_to, *message.cc, *message.recipients):
        yield "".join(address or "")

    yield from (message.extra_headers or {}).values()

    for attachment in message.attachments:
        yield from (attachment.filename or "", *attachment.headers.values())


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_a_header_is_not_added(mail: Mail, separator: str) -> None:
    """Characters that end a header in some versions of Python are refused."""
    text = f"one{separator}Bcc: eve@example.org"

    with context(mail):
        message = Message(text, ["ada@example.org"], "text")
        sent = send_ours(message)

    if isinstance(sent, Sent):
        assert is_sound(message, sent.content)
    else:
        assert isinstance(sent, BadHeaderError)


def test_a_lazy_text_is_looked_at(mail: Mail) -> None:
    """A lazy string is no way around it."""

    class Lazy:
        def __str__(self) -> str:
            return "one\x0bBcc: eve@example.org"

        def __contains__(self, text: str) -> bool:
            return text in str(self)

    with context(mail):
        message = Message(t.cast("str", Lazy()), ["ada@example.org"], "text")
        sent = send_ours(message)

    if isinstance(sent, Sent):
        assert is_sound(message, sent.content)
    else:
        assert isinstance(sent, BadHeaderError)


@pytest.mark.parametrize("separator", ["\x0b", "\x1c"])
def test_a_separator_in_the_name_of_a_header(mail: Mail, separator: str) -> None:
    """No version of Python delivers it as it is."""
    with context(mail):
        headers = {f"X{separator}Note": "a"}
        message = Message("hi", ["ada@example.org"], "text", extra_headers=headers)
        assert isinstance(send_ours(message), BadHeaderError)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\x0b", "\u2028"])
@pytest.mark.parametrize("name", ["msgId", "alts"])
def test_a_header_is_not_added_in_other_ways(
    mail: Mail, name: str, separator: str
) -> None:
    """The Message-ID and the type of an alternative become headers too."""
    text = f"x{separator}Bcc: eve@example.org"

    with context(mail):
        message = Message("hi", ["ada@example.org"], "text")
        setattr(message, name, text if name == "msgId" else {text: "text"})
        sent = send_ours(message)

    if isinstance(sent, Sent):
        assert separator not in {"\n", "\r\n"}
        assert not any(
            "bcc" in part for part in email.message_from_bytes(sent.content).walk()
        )
    else:
        assert isinstance(sent, BadHeaderError | UnicodeEncodeError)


def test_an_unknown_charset(mail: Mail) -> None:
    """It is the same error as in Flask-Mail, and not one about line breaks."""
    with context(mail):
        message = Message("hi", ["ada@example.org"], "text", charset="ütf-8")
        plain, ours = send_plain(mail, message), send_ours(message)

    assert isinstance(ours, email.errors.CharsetError)
    assert repr(ours) == repr(plain)
