from __future__ import annotations

import base64
import binascii
import collections
import re
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Maximum characters of a server's words to show, as some servers write a page, and to
# search for secrets, which takes quadratic time.
_SHOWN, _SEARCHED = 300, 2_000

# A name may have an apostrophe, but not at its ends. In a URL, "@" is "%40".
_ADDRESS = re.compile(
    r"""<?(?:"[^"]*"|[^\s<>()\[\],;:"']+(?:'[^\s<>()\[\],;:"']+)*)(?:@|%40)"""
    r"""(?:\[[^\s\[\]]*\]|[^\s<>()\[\],;:"']+)>?"""
)
_BASE64 = re.compile(
    r"(?<![A-Za-z0-9+/=])(?:[A-Za-z0-9+/]{8,}={0,2}|[A-Za-z0-9+/]{2,}={1,2})"
    r"(?![A-Za-z0-9+/=])"
)
# The status of a reply, which is not secret, even if a user name is "1".
_STATUS = re.compile(r"(?:\d{3} (?:\d\.\d{1,3}\.\d{1,3}\b)?)?")
_MIXED = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*[0-9]).{16,}")

# What an error calls a stage, and which key to check if a connection breaks there.
PLACES = {
    "connect": ("the TCP connect", " Check MAIL_SERVER and MAIL_PORT."),
    "greeting": (
        "the greeting",
        " If MAIL_PORT is for TLS from the start (usually 465), set MAIL_USE_SSL.",
    ),
    "TLS": (
        "the TLS handshake",
        " MAIL_PORT may be wrong: 465 is usual for MAIL_USE_SSL, 587 for MAIL_USE_TLS.",
    ),
    "message": ("the message", ""),
    "end of message": ("the end of the message", ""),
}

_LOG_IN = "Set MAIL_USERNAME and MAIL_PASSWORD."
TEMPORARY = "A 4xx reply is temporary: the server may accept the message later."

# Stages, a pattern for the reply, what it means, and a remedy. The first row that fits
# counts. The codes with dots are from RFC 3463 and IANA's registry. Matching words is
# the last resort, because servers explain their policies in any words. No remedy ("")
# is better than the wrong key.
_CAUSES: list[tuple[str, str, str, str]] = [
    (
        "greeting EHLO AUTH MAIL RCPT DATA end",
        r"^4.*\b(too many|concurrent|number of) (\w+ )?(connections|sessions)\b"
        r"|^432 .*thread limit",
        "Too many connections are open at once, says {}",
        "Allow fewer in all processes together (APITASK_MAIL_CONNECTIONS).",
    ),
    (
        "MAIL RCPT DATA end",
        r"^5\d\d 5\.7\.(2[0-46]|515)\b|^5.*\b(SPF|DKIM|DMARC)\b",
        "The sender's domain failed the checks (SPF, DKIM, DMARC) of {}",
        "",
    ),
    (
        "EHLO AUTH MAIL RCPT DATA",
        r"^538|^\d+ 5\.7\.1[01]\b|must issue a STARTTLS"
        r"|\b(STARTTLS|TLS|encryption) (is )?(required|needed)(?! (by|for)\b)",
        "An encrypted connection is required by {}",
        "Set MAIL_USE_TLS.",
    ),
    (
        "MAIL RCPT DATA end",
        r"^530|^5\d\d 5\.7\.57\b|^5\d\d (5\.7\.\d+ )?(SMTP )?AUTH\w* (is )?required"
        r"|^5.*(: not logged in|unauthenticated senders not allowed"
        r"|turn on SMTP authentication)",
        "A log-in is required by {}",
        _LOG_IN,
    ),
    (
        "MAIL RCPT DATA end",
        r"^5\d\d 5\.7\.(54|64)\b|relay access denied|relay(ing)? (denied|not permitted)"
        r"|^5.*unable to relay",
        "The message is not relayed by {}",
        f"If the server relays for users who log in: {_LOG_IN} If not, check"
        " MAIL_SERVER.",
    ),
    (
        "DATA end",
        r"^5.*(\blines?\b.*(too long|length)|too long.* line)",
        "The message has a line that is too long for {}",
        "Break the lines of its text and HTML: SMTP allows 998 characters in a line.",
    ),
    (
        "RCPT DATA end",
        r"^[45]\d\d [45]\.2\.2\b|\bmailbox\b.*(full|quota|exceed)|over quota",
        "A recipient's mailbox is full, says {}",
        "",
    ),
    (
        "MAIL RCPT DATA end",
        r"^5\d\d 5\.(3\.4|2\.3)\b|^552 (?!\d\.).*(size|big|large|long)"
        r"|^5.*message (is )?too (big|large)",
        "The message is too large for {}",
        "Link to a file instead of attaching it.",
    ),
    (
        "MAIL RCPT DATA end",
        r"^5\d\d 5\.(1\.[78]|7\.60|2\.252)\b|not authorized to send from"
        r"|^5.*((?<!unauthenticated )sender (address )?(rejected|verify failed)"
        r"|verified sender identity|SendAsDenied|relaying disallowed as"
        r"|mail from (address )?must (be same as|equal))",
        "The sender was refused by {}",
        "Check MAIL_DEFAULT_SENDER.",
    ),
    (
        "MAIL",
        r"^5\d\d 5\.1\.|^553",
        "The sender was refused by {}",
        "Check MAIL_DEFAULT_SENDER.",
    ),
    (
        "AUTH",
        r"application-specific password",
        "An application-specific password is required by {}",
        "Create one in the account's settings, and set MAIL_PASSWORD to it.",
    ),
    (
        "AUTH",
        r"^535 (?!5\.7\.13)|^5\d\d 5\.7\.8\b",
        "The user name or the password was refused by {}",
        "Check MAIL_USERNAME and MAIL_PASSWORD.",
    ),
    ("AUTH", "", "The log-in was refused by {}", ""),
    ("greeting", "", "The connection was refused by {}", ""),
    ("EHLO", "", "EHLO was refused by {}", ""),
    ("STARTTLS", "", "STARTTLS was refused by {}", ""),
    ("", "", "The message was refused by {}", ""),
]


class Reply(t.NamedTuple):
    """A server's reply, in the form that :mod:`smtplib` uses."""

    code: int
    words: bytes

    @property
    def is_positive(self) -> bool:
        return self.code // 100 == 2

    @property
    def text(self) -> str:
        words = " ".join(self.words.decode(errors="replace").split())
        return f"{self.code} {words[:_SEARCHED]}"


def explain(stage: str, reply: Reply) -> tuple[str, str]:
    """Return what a refusal means, with ``{}`` for the server, and a remedy."""
    meaning, remedy = next(
        (meaning, remedy)
        for stages, pattern, meaning, remedy in _CAUSES
        if (not stages or stage.split()[0] in stages.split())
        and re.search(pattern, reply.text, re.IGNORECASE)
    )

    # Not every 4xx is temporary: Exchange says 451 5.7.3, and SendGrid 403, where a
    # second attempt can't help.
    if re.match(r"4[2-5]\d (?!5\.)", reply.text):
        remedy = f"{TEMPORARY} {remedy}".rstrip()

    return meaning, remedy


def show(replies: cabc.Iterable[Reply], secrets: cabc.Iterable[str]) -> str:
    """List replies and how often each came, masked so that they can be logged."""
    secrets = list(secrets)
    counts = collections.Counter(mask(reply.text, secrets) for reply in replies)
    return ", ".join(
        text if count == 1 else f"{text} ({count} times)"
        for text, count in counts.items()
    )


def mask(text: str, secrets: cabc.Iterable[str]) -> str:
    """Hide addresses, secrets and base64 in a server's words, which may quote them.

    :param secrets: User name, password, addresses. Their local parts are hidden too.
    """
    status = t.cast("re.Match[str]", _STATUS.match(text))[0]
    text = _ADDRESS.sub("<address>", text[len(status) : _SEARCHED])

    for secret in {part for name in secrets for part in (name, name.partition("@")[0])}:
        if secret:
            pattern = rf"(?<!\w){re.escape(secret)}(?!\w)"
            text = re.sub(pattern, "<hidden>", text, flags=re.IGNORECASE)

    text = _BASE64.sub(_hide_base64, text)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return f"{status}{text}"[:_SHOWN].rstrip(". ")


def _hide_base64(match: re.Match[str]) -> str:
    """Hide a token that decodes to text or does not look like a word."""
    token = match[0]

    try:
        decoded = base64.b64decode(token, validate=True)
        is_text = all(octet < 127 for octet in decoded)
    except binascii.Error:
        is_text = False

    return "<base64>" if is_text or _MIXED.match(token) else token
