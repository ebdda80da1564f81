from __future__ import annotations

import dataclasses
import functools
import re
import smtplib
import ssl

_FOLD = re.compile(r"\r?\n(?=[ \t])")
_UNFIT = re.compile(r"[\0\r\n\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Envelope:
    """A rendered message and its recipients. Its ``repr`` shows no address.

    :param sender: An address, like each recipient; display names are dropped.
    :param content: The message in the format of :rfc:`5322`, with any line endings.
    :param message_id: The ``Message-ID`` header, by which errors name the message.
    :raises ValueError: There is no recipient, or an address or option can't be encoded
        or has a line break, which could be followed by a command.
    """

    sender: str = dataclasses.field(repr=False)
    recipients: tuple[str, ...] = dataclasses.field(repr=False)
    content: bytes = dataclasses.field(repr=False)
    message_id: str
    mail_options: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    rcpt_options: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.recipients:
            raise ValueError(f"The message {self.message_id!r} has no recipients.")

        # A long display name is folded, because it was made for a header.
        paths = [_FOLD.sub("", path) for path in (self.sender, *self.recipients)]

        options = (*self.mail_options, *self.rcpt_options)

        if any(map(_UNFIT.search, (*paths, *options))):
            raise ValueError(
                f"An address or an option of the message {self.message_id!r} has a line"
                " break, a null character or a lone surrogate in it."
            )

        if "SMTPUTF8" not in map(str.upper, self.mail_options):
            # As smtplib does. An address may be UTF-8 where the server offers SMTPUTF8.
            "".join(options).encode("ascii")

        sender, *recipients = [smtplib.quoteaddr(path)[1:-1] for path in paths]
        object.__setattr__(self, "sender", sender)
        # A recipient given twice, with different names, still gets one copy.
        object.__setattr__(self, "recipients", tuple(dict.fromkeys(recipients)))


@dataclasses.dataclass(frozen=True)
class SMTPSettings:
    """Which server to send mail to, and how. Its ``repr`` shows no credentials.

    :param port: 0 for the usual one: 25, or 465 with ``use_ssl``.
    :param use_tls: Switch to TLS with ``STARTTLS``, or send nothing.
    :param use_ssl: Speak TLS from the first byte on; never with ``use_tls``.
    :param username: Log in, if there is a password too.
    :param timeout: Seconds allowed for each of these: a TCP connect, a TLS handshake, a
        reply, all of ``AUTH``, and each 16 KiB of a message.
    :param timeout_key: The key that sets the timeout, for error messages.
    :param tls_verify: Check the certificate and its host name; the path of a CA file
        to check against it instead of the system's trust store.
    :param certfile: The path of a certificate to show to the server, with its chain.
    :param keyfile: The path of its unencrypted key, if that is in another file.
    :param max_messages: Messages per connection, ``None`` for as many as there are.
    :param debug: Above 0, write the dialogue to ``stderr``, except for ``AUTH``.
    :raises ValueError: There is a ``keyfile``, but no ``certfile``.
    """

    host: str = "127.0.0.1"
    port: int = 0
    use_tls: bool = False
    use_ssl: bool = False
    username: str | None = dataclasses.field(default=None, repr=False)
    password: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 10.0
    timeout_key: str = "APITASK_MAIL_TIMEOUT"
    tls_verify: bool | str = True
    certfile: str | None = None
    keyfile: str | None = None
    max_messages: int | None = None
    debug: int = 0

    def __post_init__(self) -> None:
        if self.keyfile and not self.certfile:
            raise ValueError(
                f"The key {self.keyfile!r} is useless without its certificate. Set"
                " MAIL_SSL_CERTFILE."
            )

        if not self.port:
            usual = smtplib.SMTP_SSL_PORT if self.use_ssl else smtplib.SMTP_PORT
            object.__setattr__(self, "port", usual)

    def __str__(self) -> str:
        return f"the mail server at '{self.host}:{self.port}'"

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the context for connections to this server, ``None`` without TLS.

        :raises ValueError: A file can't be read.
        """
        if not (self.use_tls or self.use_ssl):
            return None

        return _load_context(self.tls_verify, self.certfile, self.keyfile)


# Loading a trust store takes some 30 ms and most of a megabyte.
@functools.lru_cache(maxsize=8)
def _load_context(
    verify: bool | str, certfile: str | None, keyfile: str | None
) -> ssl.SSLContext:
    cafile = verify if isinstance(verify, str) else None

    try:
        context = ssl.create_default_context(cafile=cafile)
    except OSError as error:
        raise ValueError(
            f"{cafile!r} can't be loaded as a file of CA certificates: {error}."
        ) from error

    if certfile:
        try:
            # Without a password, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(certfile, keyfile, password="")
        except OSError as error:
            raise ValueError(
                f"{certfile!r} (MAIL_SSL_CERTFILE) with the key in"
                f" {keyfile or certfile!r} (MAIL_SSL_KEYFILE) can't be loaded: {error}."
                " Both must be PEM files, and the key must not be encrypted."
            ) from error

    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE

    return context
