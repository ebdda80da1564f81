from __future__ import annotations

import typing as t

from ..config import read_flag
from ..config import read_seconds
from ..config import read_whole
from .envelope import SMTPSettings

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from ..config import Config


def read_settings(keys: cabc.Mapping[str, t.Any], config: Config) -> SMTPSettings:
    """Read the keys of a mail library, which may be strings from environment variables.

    :raises ValueError: A value is not allowed. The message names the key, the value and
        what is allowed.
    """
    use_tls, use_ssl = _read_tls(keys.get("MAIL_USE_TLS"), keys.get("MAIL_USE_SSL"))
    read_mail_flag("MAIL_SUPPRESS_SEND", keys.get("MAIL_SUPPRESS_SEND"))
    port, most = keys.get("MAIL_PORT") or 0, keys.get("MAIL_MAX_EMAILS") or 0
    debug = keys.get("MAIL_DEBUG", 0)
    debug = int(debug) if isinstance(debug, bool) else debug
    text = "True, False, or a whole number of at least 0"
    username, password = keys.get("MAIL_USERNAME"), keys.get("MAIL_PASSWORD")
    # A key of Flask-Mailman, like those of the certificate.
    timeout = keys.get("MAIL_TIMEOUT")
    return SMTPSettings(
        host=keys.get("MAIL_SERVER", "127.0.0.1"),
        port=read_whole("MAIL_PORT", port, "a port from 1 to 65535", 0, 65_535),
        use_tls=use_tls,
        use_ssl=use_ssl,
        # Flask reads an environment variable that looks like a number as one.
        username=None if username is None else str(username),
        password=None if password is None else str(password),
        timeout=(
            config.mail_timeout
            if timeout is None
            else read_seconds("MAIL_TIMEOUT", timeout)
        ),
        timeout_key="APITASK_MAIL_TIMEOUT" if timeout is None else "MAIL_TIMEOUT",
        tls_verify=config.mail_tls_verify,
        certfile=keys.get("MAIL_SSL_CERTFILE"),
        keyfile=keys.get("MAIL_SSL_KEYFILE"),
        max_messages=read_whole(
            "MAIL_MAX_EMAILS", most, "a whole number, or None for no limit", 0
        )
        or None,
        debug=read_whole("MAIL_DEBUG", debug, text, 0),
    )


def _read_tls(use_tls: object, use_ssl: object) -> tuple[bool, bool]:
    is_tls = read_mail_flag("MAIL_USE_TLS", use_tls)
    is_ssl = read_mail_flag("MAIL_USE_SSL", use_ssl)

    if is_tls and is_ssl:
        raise ValueError(
            f"MAIL_USE_TLS is {use_tls!r} and MAIL_USE_SSL is {use_ssl!r}, but only one"
            " can be on: STARTTLS, usually on port 587, or TLS from the start, usually"
            " on port 465."
        )

    return is_tls, is_ssl


def read_mail_flag(key: str, value: object) -> bool:
    """Read a flag as Flask-Mail does, but a word such as "false" by its meaning."""
    if not isinstance(value, str):
        return bool(value)

    is_none = value.strip().lower() in {"", "none"}
    return not is_none and read_flag(key, value)


def is_suppressed(mail: t.Any) -> bool:
    """Tell whether Flask-Mail is told not to send. Flask-Mailman has no such key."""
    return read_mail_flag("MAIL_SUPPRESS_SEND", getattr(mail, "suppress", False))
