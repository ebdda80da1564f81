from __future__ import annotations

import copy
import email
import email.errors
import re
import types
import typing as t

import flask_mail
from flask_mail import Attachment
from flask_mail import Message

from ..executor.task import look_up
from .envelope import Envelope

if t.TYPE_CHECKING:
    import collections.abc as cabc

Address: t.TypeAlias = "str | tuple[str, str]"

_LINE_BREAK = re.compile(r"[\r\n]")
# Before Python 3.13, the email package ends a header's line wherever str.splitlines()
# does.
_SEPARATOR = re.compile(r"[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_BAD_HEADER = (
    "There is a line break in an address, the subject, the Message-ID, an extra header,"
    " a part's type, name or headers, or the envelope's sender."
)


def check(message: flask_mail.Message, envelope_from: Address | None = None) -> None:
    """Refuse what Flask-Mail refuses, and line breaks in every header.

    Flask-Mail refuses CR and LF in the subject (except in folds), the sender,
    ``reply_to`` and the recipients, display names included. In other headers it lets
    them through, where they add a header (``extra_headers``), change who gets the
    message (``cc`` and ``bcc`` as text), or are encoded (a name in a tuple). Text from
    a single-line input never has them, so one rule will do for all.
    """
    if not message.send_to:
        raise AssertionError("No recipients have been added")

    if not message.sender:
        raise AssertionError(
            "The message does not specify a sender and a default sender has not been"
            " configured"
        )

    texts = _header_texts(message, envelope_from)

    if any(map(_LINE_BREAK.search, texts)) or message.has_bad_headers():
        raise flask_mail.BadHeaderError(_BAD_HEADER)


def render(
    message: flask_mail.Message, envelope_from: Address | None = None
) -> Envelope:
    """Render a message as Flask-Mail does.

    Line separators other than CR and LF are delivered where Flask-Mail encodes them,
    which it does in most texts.

    :raises flask_mail.BadHeaderError: A separator has turned text into a header.
    """
    texts = _header_texts(message, envelope_from)
    has_separator = any(map(_SEPARATOR.search, texts))

    try:
        content = message.as_bytes()

        if has_separator and _outline(content) != _outline(_clean(message).as_bytes()):
            raise email.errors.HeaderParseError("A header was added.")
    except email.errors.CharsetError:
        # The message's charset has a name outside ASCII.
        raise
    except (email.errors.MessageError, ValueError) as error:
        # Newer versions of Python detect it themselves. Any other ValueError is about
        # text that can't be encoded.
        is_ours = has_separator and not isinstance(error, UnicodeError)

        if not is_ours and not isinstance(error, email.errors.MessageError):
            raise

        raise flask_mail.BadHeaderError(_BAD_HEADER) from error

    return Envelope(
        flask_mail.sanitize_address(envelope_from or message.sender),
        tuple(flask_mail.sanitize_addresses(message.send_to)),
        content,
        message.msgId,
        tuple(message.mail_options or ()),
        tuple(message.rcpt_options or ()),
    )


def _header_texts(
    message: flask_mail.Message, envelope_from: Address | None
) -> cabc.Iterator[str]:
    """Yield the texts that go into headers, without the folds of the subject."""
    yield str(message.subject or "").replace("\r\n", "")
    fields: list[t.Any] = [envelope_from or "", message.sender, message.reply_to or ""]
    fields += [*message.recipients, *(message.cc or ()), *(message.bcc or ())]
    fields += (message.extra_headers or {}).items()
    fields += [message.msgId or "", *(message.alts or ())]

    for attachment in message.attachments or ():
        fields += [attachment.filename or "", attachment.content_type]
        fields += [attachment.disposition, *attachment.headers.items()]

    for field in fields:
        yield "".join(map(str, field))


def _clean(value: t.Any) -> t.Any:
    """Copy a message, or a part of it, without separators in the texts for headers."""
    if isinstance(value, Message | Attachment):
        clean = copy.copy(value)
        texts = vars(value).keys() - {"body", "alts", "data"}
        vars(clean).update((name, _clean(getattr(value, name))) for name in texts)

        if isinstance(value, Message) and value.alts:
            alts = {_clean(name): text for name, text in value.alts.items()}
            vars(clean)["alts"] = alts

        return clean

    if isinstance(value, dict):
        return {_clean(name): _clean(part) for name, part in value.items()}

    if isinstance(value, list | tuple):
        return type(value)(map(_clean, value))

    # Anything else may be a lazy string.
    is_number = value is None or isinstance(value, int | float)
    return value if is_number else _SEPARATOR.sub("_", str(value))


def _outline(content: bytes) -> list[tuple[list[str], int]]:
    """Return the names of the headers and the number of defects of each part."""
    parts = email.message_from_bytes(content).walk()
    return [(sorted(map(str.lower, part)), len(part.defects)) for part in parts]


def snapshot(value: t.Any) -> t.Any:
    """Copy a message, or an argument of a message, as it is now.

    Lazy strings become text, in the caller's locale. Anything else, such as a mock,
    stays as it is.
    """
    if isinstance(value, Message | Attachment):
        copied = copy.copy(value)
        parts = {name: snapshot(part) for name, part in vars(value).items()}
        vars(copied).update(parts)
        return copied

    if type(value) in {list, tuple, set}:
        return type(value)(map(snapshot, value))

    if type(value) is dict:
        return {name: snapshot(part) for name, part in value.items()}

    if isinstance(value, list | dict):
        # A subclass knows best how to copy itself.
        return value.copy()

    # It passes calls of a string's methods on to one, as proxies do. isinstance() would
    # take a proxy for a string.
    is_lazy = isinstance(look_up(value, "casefold"), types.BuiltinMethodType)
    return str(value) if is_lazy and not issubclass(type(value), str) else value
