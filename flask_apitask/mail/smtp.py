from __future__ import annotations

import contextlib
import functools
import re
import smtplib
import socket
import ssl
import sys
import time
import typing as t

from ..exceptions import DeliveryError
from ..exceptions import DeliveryUnknown
from .replies import explain
from .replies import Reply
from .replies import show

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .envelope import Envelope
    from .envelope import SMTPSettings

    SMTP = smtplib.SMTP
else:
    # smtplib.SMTP may be a mock when this is imported, and must not be one for ever.
    SMTP = smtplib.LMTP.__base__

# Bytes written under one timeout. It is the most that a TLS record holds: SSLSocket's
# sendall() starts the timeout anew for every record, and so this bounds both kinds.
_CHUNK = 16_384
# Bytes of pipelined commands written before their replies are read. They fit into the
# send buffer of any kernel, so that a server which waits for its replies to be read
# never meets a client that waits for its commands to be (RFC 2920, section 3.1).
_GROUP = 8_192
# Bytes of one reply, all of its lines: a hundred times the longest that is of use.
_REPLY = 65_536
_QUIT_TIMEOUT = 1.0

_REPLY_LINE = re.compile(rb"[2-5][0-9]{2}(?:[ -].*)?\r?")

# What an error calls a stage, and which key to look at.
_STAGES = {
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


class ConnectionLost(DeliveryError):
    """Raised when a connection broke before the server had the whole of a message.

    Nothing was delivered: to send the message again can't make two of it.

    :param timed_out: Nothing came in time, while the other cases are a hang-up.
    """

    timed_out = False

    @property
    def busy(self) -> bool:
        """Whether the server said 421: it hangs up for a reason of its own."""
        return self.smtp_code == 421


class SMTPSession(SMTP):
    """A dialogue with a mail server: :meth:`open` it, :meth:`deliver`, quit.

    One that was closed can be opened again. It is for one thread at a time. A message
    takes two round trips where the server offers ``PIPELINING`` (:rfc:`2920`), else
    three and one per recipient.

    What :mod:`smtplib` knows of ``EHLO``, ``AUTH`` and addresses stays. Its way to read
    does not: there half a reply line is a reply, a reply that nothing asked for answers
    the next command, and a byte within each timeout makes a reply take for ever.

    No exception's text holds an address or a credential. The server's words, which may
    quote them, are masked in it.
    """

    sock: t.Any = None

    def __init__(self, settings: SMTPSettings) -> None:
        super().__init__(local_hostname="", timeout=settings.timeout)
        self.settings = settings
        self.messages = 0
        self._received = b""
        self._stage = "connect"
        # Set while several replies share one timeout.
        self._deadline: float | None = None
        # When the server last answered, or took a part of a message.
        self.heard_at = 0.0
        # No reply is due and no transaction is open: any command may follow.
        self._in_order = False

    def open(self) -> None:
        """Connect, switch to TLS and log in, as the settings say.

        :raises DeliveryError: Something of it failed, and the session is closed.
        """
        settings = self.settings
        self.close()
        self.messages = 0
        self._received = b""
        self._deadline = None
        self.local_hostname = _local_hostname()
        self.set_debuglevel(settings.debug)

        try:
            self._connect()
            self._stage = "greeting"
            self._expect(self.getreply())
            self._greet()

            if settings.use_tls:
                self._upgrade()

            if settings.username and settings.password:
                self._authenticate(settings.username, settings.password)
        except BaseException:
            self.close()
            raise

        self._in_order = True

    def usable(self) -> bool:
        """Tell whether another message can be sent, without a round trip."""
        limit = self.settings.max_messages
        return (
            self._in_order
            and (not limit or self.messages < limit)
            and not self._is_dropped()
        )

    def deliver(self, envelope: Envelope) -> None:
        """Send a message once.

        :raises DeliveryError: The server did not take it, or not for all recipients.
        :raises ConnectionLost: The server can't have taken it.
        :raises DeliveryUnknown: The server had all of it, and gave no proper reply.
        """
        content = dot_stuff(envelope.content)
        # Without the final dot, and dots that are doubled don't count either.
        commands = self._commands(envelope, len(content) - 3)
        self.messages += 1
        self._in_order = False
        replies = self._start_transaction(commands)
        self._check_transaction(envelope, replies)
        self._stage = "message"
        # A ConnectionLost up to here says that the line with the dot did not get out.
        self.send(content)
        self._check_end(envelope)
        refused = _refused_recipients(envelope, replies)

        if refused:
            raise self._recipients_refused(envelope, refused, taken=True)

    def close(self) -> None:
        """Close the socket without a word, and without an effect on a forked twin."""
        self._in_order = False

        with contextlib.suppress(OSError):
            super().close()

    def send(self, s: t.Any) -> None:
        """Write commands or a message, each 16 KiB within the timeout.

        :raises ConnectionLost: The operating system did not take the last byte, so the
            server can't have it.
        """
        octets = s.encode(self.command_encoding) if isinstance(s, str) else s

        for start in range(0, len(octets), _CHUNK):
            if self._is_dropped():
                reply = self.getreply()
                shown = show([reply], self._secrets)
                raise self._lost(f"the server said {shown!r} unasked", reply)

            self.sock.settimeout(self.settings.timeout)

            try:
                super().send(octets[start : start + _CHUNK])
            except smtplib.SMTPServerDisconnected as error:
                raise self._lost(error.__context__) from None

            self.heard_at = time.monotonic()

    def getreply(self) -> Reply:
        """Read a reply of one or more lines, all of it within the timeout.

        :raises ConnectionLost: There was none, or a 421.
        """
        deadline = self._deadline or time.monotonic() + self.settings.timeout
        lines: list[bytes] = []
        size = 0

        while not lines or lines[-1][3:4] == b"-":
            while b"\n" not in self._received:
                self._receive(deadline)

            line, _, self._received = self._received.partition(b"\n")
            lines.append(line)

            if self.debuglevel > 0:
                sys.stderr.write(f"reply: {line!r}\n")

            if not _REPLY_LINE.fullmatch(line) or line[:3] != lines[0][:3]:
                raise self._lost("its answer is not an SMTP reply")

            if (size := size + len(line) + 1) > _REPLY:
                raise self._lost("its answer has no end")

        self.heard_at = time.monotonic()
        words = b"\n".join(line[4:].strip() for line in lines)
        reply = Reply(int(lines[0][:3]), words)

        if reply.code == 421:
            raise self._lost(
                f"{show([reply], self._secrets)!r} ended it. The server may allow fewer"
                " connections (APITASK_MAIL_CONNECTIONS) or messages (MAIL_MAX_EMAILS)",
                reply,
            )

        return reply

    def end(self, deadline: float) -> None:
        """Close, with ``QUIT`` if the dialogue is at a place for it.

        Never raises: what was taken before is delivered, whether this works or not.

        :param deadline: When to wait for the reply no longer, by the monotonic clock.
        """
        self._deadline = deadline

        try:
            if self._in_order:
                with contextlib.suppress(ConnectionLost):
                    self._stage = "QUIT"
                    self.docmd("QUIT")
        finally:
            self.close()

    def _receive(self, deadline: float) -> None:
        try:
            # 0 would mean not to wait at all, which is another error.
            self.sock.settimeout(max(deadline - time.monotonic(), 1e-6))
            received = self.sock.recv(4096)
        except OSError as error:
            raise self._lost(error) from None

        self._received += received

        if not received or len(self._received) > _REPLY:
            raise self._lost(
                "its answer has no end" if received else "the server closed it"
            )

    def _is_dropped(self) -> bool:
        """Tell whether something came that nothing has asked for, such as the end.

        Reading tells it and selecting would not: TLS has messages of its own.
        """
        if not self._received:
            self.sock.settimeout(0)

            try:
                self._received += self.sock.recv(4096)
            except (BlockingIOError, ssl.SSLWantReadError):
                return False
            except OSError:
                pass

        return True

    def _connect(self) -> None:
        self._stage = "connect"
        address = self.settings.host, self.settings.port

        try:
            self.sock = socket.create_connection(address, self.settings.timeout)
        except (OSError, UnicodeError) as error:
            raise self._lost(error) from None

        # The end of a chunk must not wait for a delayed acknowledgement.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        if self.settings.use_ssl:
            self._start_tls()

    def _start_tls(self) -> None:
        self._stage = "TLS"
        context = t.cast("ssl.SSLContext", self.settings.tls_context())
        self.sock.settimeout(self.settings.timeout)

        try:
            self.sock = context.wrap_socket(
                self.sock, server_hostname=self.settings.host
            )
        except ssl.SSLCertVerificationError as error:
            raise self._error(
                f"The certificate of {self.settings} could not be verified:"
                f" {error.verify_message.rstrip('.')}. Set MAIL_SERVER to a name in the"
                " certificate, or APITASK_MAIL_TLS_VERIFY to your CA file."
            ) from None
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, cause: object, reply: Reply | None = None) -> ConnectionLost:
        """Close the connection and make the exception that says why."""
        self.close()
        place, remedy = _STAGES.get(self._stage, (self._stage, ""))
        timed_out = isinstance(cause, TimeoutError)

        if timed_out:
            seconds = f"{self.settings.timeout:g} s (APITASK_MAIL_TIMEOUT)"
            cause = f"it took more than {seconds}"

        lost = ConnectionLost(
            f"The connection to {self.settings} failed at {place}: {cause}.{remedy}",
            stage=self._stage,
            reply=reply,
        )
        lost.timed_out = timed_out
        return lost

    def _error(self, message: str) -> DeliveryError:
        return DeliveryError(message, stage=self._stage)

    @property
    def _secrets(self) -> list[str]:
        return [self.settings.username or "", self.settings.password or ""]

    def _expect(self, reply: Reply) -> None:
        if not reply.is_positive:
            raise self._refused(reply)

    def _refused(self, reply: Reply, *secrets: str) -> DeliveryError:
        meaning, remedy = explain(self._stage, reply)
        return DeliveryError(
            f"{meaning.format(self.settings)}:"
            f" {show([reply], [*self._secrets, *secrets])}. {remedy}".rstrip(),
            stage=self._stage,
            reply=reply,
        )

    def _recipients_refused(
        self, envelope: Envelope, refused: dict[str, Reply], *, taken: bool
    ) -> DeliveryError:
        replies = refused.values()
        of_all = f"{len(refused)} of {len(envelope.recipients)} recipients"
        what = (
            f"The message was taken by {self.settings}, but not for {of_all}"
            if taken
            else f"Every recipient of {len(refused)} was refused by {self.settings}"
        )
        remedies = {explain("RCPT", reply)[1] for reply in replies}
        shown = show(replies, [*self._secrets, *refused])
        return DeliveryError(
            f"{what}: {shown}. {' '.join(remedies)}".rstrip(),
            stage="RCPT",
            recipients=dict(refused),
        )

    def _greet(self) -> None:
        self._stage = "EHLO"
        self.does_esmtp = False
        reply = self.ehlo()

        if not Reply(*reply).is_positive:
            reply = self.helo()

        self._expect(Reply(*reply))

    def _upgrade(self) -> None:
        """Switch to TLS. Nothing learned or received before it counts after it."""
        self._stage = "STARTTLS"

        if not self.has_extn("starttls"):
            raise self._error(
                f"STARTTLS is not offered by {self.settings}, so nothing was sent."
                " MAIL_PORT may be wrong (587 is usual for STARTTLS), or something on"
                " the way removes the offer."
            )

        self._expect(Reply(*self.docmd("STARTTLS")))

        if self._received:
            raise self._error(
                f"Plain text follows the STARTTLS reply of {self.settings}, so nothing"
                " was sent. It is broken, or something on the way forges replies."
            )

        self._start_tls()
        self._greet()

    def _authenticate(self, username: str, password: str) -> None:
        """Log in, with one timeout for all of it: servers may ask many questions."""
        self._stage = "AUTH"
        self._deadline = time.monotonic() + self.settings.timeout
        self.set_debuglevel(0)

        try:
            self.login(username, password)
        except ConnectionLost:
            raise
        except smtplib.SMTPResponseException as error:
            reply = Reply(error.smtp_code, t.cast("bytes", error.smtp_error))
            raise self._refused(reply) from None
        except UnicodeEncodeError:
            raise self._error(
                f"MAIL_USERNAME or MAIL_PASSWORD for {self.settings} has a character"
                " outside of ASCII, and smtplib can't log in with it."
            ) from None
        except (smtplib.SMTPException, ValueError):
            raise self._error(
                f"No way to log in that smtplib knows is offered by {self.settings}. If"
                " it has none without TLS, set MAIL_USE_TLS; if it needs none, leave"
                " MAIL_USERNAME out."
            ) from None
        finally:
            self._deadline = None
            self.set_debuglevel(self.settings.debug)

    def _commands(self, envelope: Envelope, size: int) -> list[bytes]:
        """Make the lines that go before the message, ``DATA`` the last of them."""
        options = [f"SIZE={size}"] if self.has_extn("size") else []
        options += envelope.mail_options

        if not "".join([envelope.sender, *envelope.recipients]).isascii():
            if not self.has_extn("smtputf8"):
                self._stage = "MAIL"
                raise self._error(
                    "The message needs SMTPUTF8, for an address outside of ASCII, and"
                    f" {self.settings} does not offer it."
                )

            wanted = ("SMTPUTF8", "BODY=8BITMIME")
            options += [option for option in wanted if option not in options]

        lines = [
            f"MAIL FROM:<{envelope.sender}>",
            *(f"RCPT TO:<{recipient}>" for recipient in envelope.recipients),
        ]

        if self.does_esmtp:
            lines[0] = " ".join([lines[0], *options])
            lines[1:] = [" ".join([line, *envelope.rcpt_options]) for line in lines[1:]]

        return [line.encode() + b"\r\n" for line in [*lines, "DATA"]]

    def _start_transaction(self, commands: list[bytes]) -> list[Reply]:
        """Send the commands and return a reply for each that was of use."""
        replies: list[Reply] = []
        groups = _groups(commands, _GROUP if self.has_extn("pipelining") else 0)

        for group in groups:
            if _all_refused(replies, len(commands)):
                break

            self._stage = group[0][:4].decode()
            self.send(b"".join(group))

            try:
                for command in group:
                    self._stage = command[:4].decode()
                    replies.append(self.getreply())
            except ConnectionLost:
                # Hanging up on the rest of a group does not take back a refusal.
                if not _all_refused(replies, len(commands)):
                    raise

        return replies

    def _check_transaction(self, envelope: Envelope, replies: list[Reply]) -> None:
        """Raise if the message itself is not to be sent."""
        sender, last = replies[0], replies[-1]
        refused = _refused_recipients(envelope, replies)

        if not sender.is_positive:
            self._stage = "MAIL"
            error = self._refused(sender, envelope.sender)
        elif len(refused) == len(envelope.recipients):
            error = self._recipients_refused(envelope, refused, taken=False)
        elif last.code != 354:
            self._stage = "DATA"
            error = self._refused(last)
        else:
            return

        if last.code == 354:
            # It waits for a message, which it might deliver.
            self.close()
        else:
            self._reset()

        raise error

    def _check_end(self, envelope: Envelope) -> None:
        """Raise if the server did not take the message, or if nobody can tell."""
        self._stage = "end of message"

        try:
            reply = self.getreply()

            if reply.code // 100 == 3:
                raise self._lost(f"it is no answer to a message to say {reply.code}")
        except ConnectionLost as lost:
            if lost.busy:
                raise

            raise DeliveryUnknown(
                f"The message may or may not be delivered: {lost} It was complete by"
                " then, so it is not sent again. Look for it in the log of the server,"
                " and allow a slow server a longer timeout (APITASK_MAIL_TIMEOUT).",
                stage=self._stage,
            ) from None

        if not reply.is_positive:
            error = self._refused(reply, envelope.sender, *envelope.recipients)
            self._reset()
            raise error

        self._in_order = True

    def _reset(self) -> None:
        """End a transaction without a message, so that the next one can begin."""
        if self.sock is not None:
            with contextlib.suppress(ConnectionLost):
                self._stage = "RSET"
                self._in_order = Reply(*self.docmd("RSET")).is_positive


def end_all(sessions: cabc.Iterable[SMTPSession]) -> None:
    """Close sessions, with a ``QUIT`` for each, and with one second for all replies.

    A process that stops has little time, and nothing depends on them any more.
    """
    deadline = time.monotonic() + _QUIT_TIMEOUT

    for session in sessions:
        session.end(deadline)


def dot_stuff(content: bytes) -> bytes:
    """Make every line end CRLF, double leading dots and add the final one.

    See :rfc:`5321#section-2.3.8` and section 4.5.2.
    """
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = (b"\n" + lines).replace(b"\n.", b"\n..").replace(b"\n", b"\r\n")[2:]
    return lines + (b".\r\n" if lines.endswith(b"\r\n") else b"\r\n.\r\n")


@functools.cache
def _local_hostname() -> str:
    # smtplib asks DNS for it with each connection.
    return str(SMTP().local_hostname)


def _refused_recipients(envelope: Envelope, replies: list[Reply]) -> dict[str, Reply]:
    pairs = zip(envelope.recipients, replies[1:], strict=False)
    return {recipient: reply for recipient, reply in pairs if not reply.is_positive}


def _all_refused(replies: list[Reply], commands: int) -> bool:
    """Tell whether the sender was refused, or every recipient."""
    if not replies:
        return False

    recipients = replies[1 : commands - 1]
    return not replies[0].is_positive or (
        len(recipients) == commands - 2
        and not any(reply.is_positive for reply in recipients)
    )


def _groups(commands: list[bytes], limit: int) -> cabc.Iterator[list[bytes]]:
    """Divide commands into groups of as many bytes as are written at once."""
    group: list[bytes] = []

    for command in commands:
        if group and sum(map(len, group)) + len(command) > limit:
            yield group
            group = []

        group.append(command)

    yield group
