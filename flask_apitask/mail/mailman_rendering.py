from __future__ import annotations

import email.errors
import re
import typing as t

from flask_mailman import BadHeaderError  # type: ignore[import-untyped]
from flask_mailman.message import sanitize_address  # type: ignore[import-untyped]

from .envelope import Envelope

# A character that is not allowed in a header's name, and one that ends a header's line,
# except in a fold.
_BAD_NAME = re.compile(r"[^!-9;-~]")
_BAD_VALUE = re.compile(r"\r?\n(?![ \t])|\r(?!\n)|[\v\f\x1c-\x1e\x85\u2028\u2029]")


def render(message: t.Any, mailman: t.Any) -> Envelope:
    """Render a message as Flask-Mailman's ``smtp`` backend does.

    :param message: A :class:`flask_mailman.EmailMessage`, with a recipient.
    :param mailman: The value of ``app.extensions["mailman"]``.
    :raises ValueError: There is no sender, or an address is not valid.
    :raises flask_mailman.BadHeaderError: There is a line break in a header.
        Flask-Mailman does not check the names of headers for one.
    """
    if not message.from_email:
        raise ValueError(
            "The message has no sender. Give it a from_email, or set"
            " MAIL_DEFAULT_SENDER."
        )

    encoding = message.encoding or mailman.default_charset

    try:
        rendered = message.message()
        content = rendered.as_bytes(linesep="\r\n")
    except email.errors.CharsetError:
        # The message's encoding has a name outside ASCII.
        raise
    except email.errors.MessageError as error:
        raise BadHeaderError(str(error)) from error

    for part in rendered.walk():
        for name, value in part.items():
            if _BAD_NAME.search(name) or _BAD_VALUE.search(str(value)):
                raise BadHeaderError(
                    f"There is a line break in the header {name!r}, or in its name."
                )

    return Envelope(
        sanitize_address(message.from_email, encoding),
        tuple(sanitize_address(each, encoding) for each in message.recipients()),
        content,
        str(rendered["Message-ID"]),
        # Flask-Mailman has these only since 1.1.
        tuple(getattr(mailman, "mail_options", ())),
    )
