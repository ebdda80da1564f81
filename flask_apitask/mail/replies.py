from __future__ import annotations

import base64
import binascii
import collections
import re
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Characters of a server's words that are shown: some write a page.
_SHOWN = 300

_ADDRESS = re.compile(r'<?(?:"[^"]*"|[^\s<>()\[\],;:"\']+)@[^\s<>()\[\],;:"\']+>?')
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/]{8,}={0,2}(?![A-Za-z0-9+/=])")
_MIXED = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*[0-9]).{16,}")

# What an error calls a stage, and which key to look at, if a connection breaks there.
PLACES = {
    "connect": ("the TCP connect", " Check MAIL_SERVER and MAIL_PORT."),
    "greeting": (
        "the greeting",
        " If MAIL_PORT is one for TLS from the start, mostly 465, set MAIL_USE_SSL.",
    ),
    "TLS": (
        "the TLS handshake",
        " MAIL_PORT may be wrong: 465 is usual for MAIL_USE_SSL, 587 for MAIL_USE_TLS.",
    ),
    "message": ("the message", ""),
    "end of message": ("the end of the message", ""),
}

_LOG_IN = "Set MAIL_USERNAME and MAIL_PASSWORD."

# What refused what, by the stage and the words; the first that fits.
_CAUSES: list[tuple[str, str, str, str]] = [
    (
        "",
        r"starttls|must use tls|tls (is )?required|encrypt",
        "An encrypted connection is asked for by {}",
        "Set MAIL_USE_TLS.",
    ),
    (
        "",
        r"^530|auth\w* (is )?required|not auth|unauth|must auth|log ?in first",
        "A log-in is missing, says {}",
        _LOG_IN,
    ),
    (
        "",
        r"relay",
        "The message is not relayed by {}",
        f"If the server relays for those who log in: {_LOG_IN} Else check MAIL_SERVER.",
    ),
    (
        "MAIL DATA message end",
        r"^552 (?!5\.2\.2)|^\d+ 5\.(3\.4|2\.3)|too (big|large)|exceeds?.*size",
        "The message is too large for {}",
        "Link to a file in place of attaching it.",
    ),
    (
        "DATA message end",
        r"line\W.*(too long|length)|too long.* line",
        "The message has a line that is too long for {}",
        "Break the lines of its text and HTML: 998 characters is the limit of SMTP.",
    ),
    (
        "AUTH",
        r"^5",
        "The user name or the password was refused by {}",
        "Check MAIL_USERNAME and MAIL_PASSWORD.",
    ),
    ("AUTH", "", "The log-in was refused by {}", ""),
    ("MAIL", r"^5", "The sender was refused by {}", "Check MAIL_DEFAULT_SENDER."),
    ("MAIL", "", "The sender was refused by {}", ""),
    ("greeting", "", "The connection was refused by {}", ""),
    ("EHLO", "", "EHLO was refused by {}", ""),
    ("STARTTLS", "", "STARTTLS was refused by {}", ""),
    ("", "", "The message was refused by {}", ""),
]


class Reply(t.NamedTuple):
    """What a server answers, as :mod:`smtplib` has it."""

    code: int
    words: bytes

    @property
    def is_positive(self) -> bool:
        return self.code // 100 == 2

    @property
    def text(self) -> str:
        return f"{self.code} {' '.join(self.words.decode(errors='replace').split())}"


def explain(stage: str, reply: Reply) -> tuple[str, str]:
    """Return what a refusal means, ``{}`` being the server, and the remedy."""
    return next(
        (meaning, remedy)
        for stages, words, meaning, remedy in _CAUSES
        if (not stages or stage.split()[0] in stages.split())
        and re.search(words, reply.text, re.IGNORECASE)
    )


def show(replies: cabc.Iterable[Reply], secrets: cabc.Iterable[str]) -> str:
    """Name replies and how often each came, for a log: without addresses or secrets."""
    secrets = list(secrets)
    counts = collections.Counter(mask(reply.text, secrets) for reply in replies)
    return ", ".join(
        text if count == 1 else f"{text} ({count} times)"
        for text, count in counts.items()
    )


def mask(text: str, secrets: cabc.Iterable[str]) -> str:
    """Hide addresses, secrets and base64 in what a server says, which may quote them.

    :param secrets: User name, password, addresses. Their local parts are hidden, too.
    """
    text = _ADDRESS.sub("<address>", text)

    for secret in {part for name in secrets for part in (name, name.partition("@")[0])}:
        if secret:
            pattern = rf"(?<!\w){re.escape(secret)}(?!\w)"
            text = re.sub(pattern, "<hidden>", text, flags=re.IGNORECASE)

    text = _BASE64.sub(_hide_base64, text)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text[:_SHOWN].rstrip(". ")


def _hide_base64(match: re.Match[str]) -> str:
    """Hide what stands for text, or looks like anything but a word."""
    token = match[0]

    try:
        decoded = base64.b64decode(token, validate=True)
        is_text = all(octet < 127 for octet in decoded)
    except binascii.Error:
        is_text = False

    return "<base64>" if is_text or _MIXED.match(token) else token
