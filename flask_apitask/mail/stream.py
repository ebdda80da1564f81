from __future__ import annotations

import re
import smtplib
import ssl
import sys
import time
import typing as t

from ..exceptions import DeliveryError
from .replies import explain
from .replies import PLACES
from .replies import Reply
from .replies import show
from .replies import TEMPORARY

if t.TYPE_CHECKING:
    from .envelope import SMTPSettings

    SMTP = smtplib.SMTP
else:
    # smtplib.SMTP may be a mock while this module is imported. Don't keep the mock.
    SMTP = smtplib.LMTP.__base__

# Maximum bytes to write under one timeout. A TLS record holds no more, and SSLSocket's
# sendall() restarts the timeout for every record. So the bound holds with and without
# TLS.
_CHUNK = 16_384
# Maximum bytes of a reply, all its lines together: a hundred times the longest useful
# reply.
_REPLY = 65_536
# Errors by which the other side ends a connection that it had accepted. A refused
# connect is not one of them.
_HANG_UPS = (
    *(EOFError, ssl.SSLEOFError, BrokenPipeError),
    *(ConnectionAbortedError, ConnectionResetError),
)
_REPLY_LINE = re.compile(rb"[2-5][0-9]{2}(?:[ -].*)?\r?")


class ConnectionLost(DeliveryError):
    """Raised when a connection broke before the server had the whole message.

    Nothing was delivered, so sending the message again can't deliver it twice.
    """

    # The other side ended a connection that it had accepted.
    hung_up = False


class SMTPStream(SMTP):
    """Writes to a mail server and reads from it, each part within a timeout.

    :mod:`smtplib` reads less strictly: it takes half a reply line for a reply, and an
    unsolicited reply for the answer to the next command, and if a byte comes within
    each timeout, a reply may take for ever.
    """

    sock: t.Any = None
    # When the server last answered or took a part of a message.
    heard_at = 0.0
    # The current stage of the dialogue, as in DeliveryError.
    _stage = "connect"
    # Received, but not read yet.
    _received = b""
    # Set while several replies share one timeout.
    _deadline: float | None = None

    def __init__(self, settings: SMTPSettings) -> None:
        super().__init__(local_hostname="", timeout=settings.timeout)
        self.settings = settings
        self._secrets = [settings.username or "", settings.password or ""]

    def send(self, s: t.Any) -> None:
        """Write commands or a message, each 16 KiB within the timeout.

        :raises ConnectionLost: The operating system did not accept the last byte, so
            the server can't have it.
        """
        octets = s.encode(self.command_encoding) if isinstance(s, str) else s

        for start in range(0, len(octets), _CHUNK):
            if self._is_dropped():
                reply = self.getreply()
                shown = show([reply], self._secrets)
                raise self._lost(f"the server said {shown!r} out of turn", reply)

            self.sock.settimeout(self.settings.timeout)

            try:
                super().send(octets[start : start + _CHUNK])
            except smtplib.SMTPServerDisconnected as error:
                raise self._lost(error.__context__) from None

            self.heard_at = time.monotonic()

    def getreply(self) -> Reply:
        """Read a reply of one or more lines, all of it within the timeout.

        :raises ConnectionLost: There was no reply, or a 421.
        """
        deadline = self._deadline or time.monotonic() + self.settings.timeout
        lines: list[bytes] = []
        size = 0

        while not lines or lines[-1][3:4] == b"-":
            lines.append(line := self._read_line(deadline))
            size += len(line) + 1

            if not _REPLY_LINE.fullmatch(line) or line[:3] != lines[0][:3]:
                raise self._lost("the server's answer is not an SMTP reply")

            if size > _REPLY:
                raise self._lost("the server's answer is too long")

        self.heard_at = time.monotonic()
        words = b"\n".join(line[4:].strip() for line in lines)
        reply = Reply(int(lines[0][:3]), words)

        if reply.code == 421:
            raise self._lost(
                f"the server ended it with {show([reply], self._secrets)!r}. It may"
                " allow fewer connections (APITASK_MAIL_CONNECTIONS) or messages"
                " (MAIL_MAX_EMAILS)",
                reply,
            )

        return reply

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            if len(self._received) > _REPLY:
                raise self._lost("the server's answer is too long")

            try:
                # A timeout of 0 would make the socket non-blocking, with another error.
                self.sock.settimeout(max(deadline - time.monotonic(), 1e-6))
                received = self.sock.recv(4096)
            except OSError as error:
                raise self._lost(error) from None

            if not received:
                raise self._lost(EOFError("the server closed it"))

            self._keep(received)

        line, _, self._received = self._received.partition(b"\n")

        if self.debuglevel > 0:
            sys.stderr.write(f"reply: {line!r}\n")

        return line

    def _is_dropped(self) -> bool:
        """Tell whether something unsolicited has come, such as the connection's end.

        select() can't tell, because TLS has messages of its own, so this has to read.
        """
        if not self._received:
            self.sock.settimeout(0)

            try:
                self._keep(self.sock.recv(4096))
            except (BlockingIOError, ssl.SSLWantReadError):
                return False
            except OSError:
                pass

        return True

    def _keep(self, received: bytes) -> None:
        # Not by +=, which makes a mock of it if a mock was received.
        self._received = b"".join([self._received, received])

    def _error(self, text: str) -> DeliveryError:
        return DeliveryError(text, stage=self._stage)

    def _lost(self, cause: object, reply: Reply | None = None) -> ConnectionLost:
        """Close the connection, and return the exception that says why."""
        self.close()
        if isinstance(cause, TimeoutError):
            key = self.settings.timeout_key
            cause = f"it took more than {self.settings.timeout:g} s ({key})"

        place, remedy = PLACES.get(self._stage, (self._stage, ""))

        # A server that has replied, or that already speaks TLS, does not wait for TLS.
        if reply:
            remedy = f" {TEMPORARY}" if reply.code // 100 == 4 else ""
        elif self._stage == "greeting" and self.settings.use_ssl:
            remedy = ""

        text = f"The connection to {self.settings} failed at {place}: {cause}.{remedy}"
        lost = ConnectionLost(text, stage=self._stage, reply=reply)
        lost.hung_up = isinstance(cause, _HANG_UPS)
        return lost

    def _refused(self, stage: str, reply: Reply, *addresses: str) -> DeliveryError:
        """Return the exception for a reply, which may quote addresses."""
        meaning, remedy = explain(stage, reply)
        shown = show([reply], [*self._secrets, *addresses])
        text = f"{meaning.format(self.settings)}: {shown}. {remedy}".rstrip()
        return DeliveryError(text, stage=stage, reply=reply)

    def _refused_recipients(
        self, refused: dict[str, Reply], what: str
    ) -> DeliveryError:
        replies = refused.values()
        remedies = dict.fromkeys(explain("RCPT", reply)[1] for reply in replies)
        shown = show(replies, [*self._secrets, *refused])
        text = " ".join([f"{what}: {shown}.", *filter(None, remedies)])
        return DeliveryError(text, stage="RCPT", recipients=dict(refused))
