from __future__ import annotations

import contextlib
import os
import re
import selectors
import smtplib
import socket
import ssl
import sys
import time
import typing as t

from ..exceptions import DeliveryError

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .envelope import Server

T = t.TypeVar("T")
Reply: t.TypeAlias = "tuple[int, bytes]"

# Bytes written under one timeout. It is the most that a TLS record holds: SSLSocket's
# sendall() starts the timeout anew for every record, and so this bounds both kinds.
_CHUNK = 16_384
# Bytes of one reply, all of its lines: a hundred times the longest that is of use.
_REPLY = 65_536

_REPLY_LINE = re.compile(rb"[2-5][0-9]{2}(?:[ -][^\n]*)?\r?\n")


class ConnectionLost(DeliveryError):
    """Raised when a connection broke before the server had the whole of a message.

    Nothing was delivered: to send the message again can't make two of it.

    :param busy: The server closes the connection with a 421, for a reason of its own.
    """

    def __init__(self, message: str, *, busy: bool = False) -> None:
        super().__init__(message)
        self.busy = busy


class Wire(smtplib.SMTP):
    """The bytes of an SMTP session: all of them in time, none of them taken for others.

    What :class:`smtplib.SMTP` knows of ``EHLO``, ``AUTH`` and addresses stays. Replaced
    is what connects, writes and reads, because there

    -   a reply may take for ever, if one byte of it comes within each timeout;
    -   half a reply line is a reply, if the server hangs up after it;
    -   a reply that nothing asked for answers the next command.

    No exception's text holds an address, a credential or words of the server, which may
    quote them.

    :param context: From :meth:`.Server.tls_context`.
    :param local_hostname: The name for ``EHLO``. smtplib asks DNS for it each time.
    """

    def __init__(
        self, server: Server, *, context: ssl.SSLContext | None, local_hostname: str
    ) -> None:
        super().__init__(local_hostname=local_hostname, timeout=server.timeout)
        self.set_debuglevel(server.debug)
        self.server = server
        self.pid = os.getpid()
        self._context = context
        self._received = bytearray()
        # What an error says is going on.
        self._stage = "the TCP connect"
        # Set while several replies share one timeout.
        self._deadline: float | None = None

    def close(self) -> None:
        """Close the socket without a word, and without an effect on a forked twin."""
        with contextlib.suppress(OSError):
            super().close()

    def send(self, s: t.Any) -> None:
        """Write commands or a message, each 16 KiB within the timeout.

        :raises ConnectionLost: The operating system did not take the last byte, so the
            server can't have it.
        """
        octets = s.encode(self.command_encoding) if isinstance(s, str) else s

        for start in range(0, len(octets), _CHUNK):
            if self._has_news():
                code, _ = self.getreply()
                raise self._lost(f"the server said {code} unasked")

            self._socket.settimeout(self.server.timeout)

            try:
                super().send(octets[start : start + _CHUNK])
            except smtplib.SMTPServerDisconnected as error:
                raise self._lost(error.__context__) from None

    def getreply(self) -> Reply:
        """Read a reply of one or more lines, all of it within the timeout.

        :raises ConnectionLost: There was none, or a 421.
        """
        deadline = self._deadline or time.monotonic() + self.server.timeout
        lines: list[bytes] = []
        left = _REPLY

        while not lines or lines[-1][3:4] == b"-":
            line = self._read_line(deadline, left)
            left -= len(line)

            if self.debuglevel > 0:
                sys.stderr.write(f"reply: {line!r}\n")

            if not _REPLY_LINE.fullmatch(line) or (lines and line[:3] != lines[0][:3]):
                raise self._lost("its answer is not an SMTP reply")

            lines.append(line)

        code = int(lines[0][:3])

        if code == 421:
            self.close()
            raise ConnectionLost(
                f"Sending was stopped at {self._stage} by {self.server} with a 421. It"
                " may allow fewer connections or messages.",
                busy=True,
            )

        return code, b"\n".join(line[4:].strip() for line in lines)

    @property
    def _socket(self) -> socket.socket:
        if self.sock is None:
            raise self._lost("it is closed")

        return self.sock

    def _read_line(self, deadline: float, limit: int) -> bytes:
        while (end := self._received.find(b"\n") + 1) == 0:
            if len(self._received) > limit:
                raise self._lost("its answer has no end")

            try:
                received = self._in_time(lambda sock: sock.recv(4096), deadline)
            except OSError as error:
                raise self._lost(error) from None

            if not received:
                raise self._lost("the server closed it")

            self._received += received

        line = bytes(self._received[:end])
        del self._received[:end]
        return line

    def _in_time(self, read: cabc.Callable[[socket.socket], T], deadline: float) -> T:
        """Do something that reads, until it is done or the time is up.

        A timeout of the socket starts anew for each recv(), and in gevent's TLS for
        each part of a record or of a handshake: a trickle could go on for ever.
        """
        sock = self._socket
        sock.settimeout(0)

        while (left := deadline - time.monotonic()) > 0:
            try:
                return read(sock)
            except (BlockingIOError, ssl.SSLWantReadError):
                event = selectors.EVENT_READ
            except ssl.SSLWantWriteError:
                event = selectors.EVENT_WRITE

            with selectors.DefaultSelector() as selector:
                selector.register(sock, event)
                selector.select(left)

        raise TimeoutError

    def _has_news(self) -> bool:
        """Tell whether something came that nothing has asked for, such as the end.

        Reading tells it and selecting would not: TLS has messages of its own.
        """
        if not self._received:
            self._socket.settimeout(0)

            try:
                self._received += self._socket.recv(4096)
            except (BlockingIOError, ssl.SSLWantReadError):
                return False
            except OSError:
                pass

        return True

    def _connect(self) -> None:
        """Connect to the first of the host's addresses that lets us, in one timeout."""
        host, port = self.server.host, self.server.port
        sys.audit("smtplib.connect", self, host, port)

        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise self._lost(error) from None

        failure = self._lost("there is no address")

        for family, kind, protocol, _, address in addresses:
            try:
                self.sock = socket.socket(family, kind, protocol)
                # The end of a chunk must not wait for a delayed acknowledgement.
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.sock.settimeout(self.server.timeout / len(addresses))
                self.sock.connect(address)
                break
            except OSError as error:
                failure = self._lost(error)
        else:
            raise failure

        if self.server.use_ssl:
            self._start_tls()

    def _start_tls(self) -> None:
        self._stage = "the TLS handshake"
        deadline = time.monotonic() + self.server.timeout

        try:
            self.sock = sock = t.cast("ssl.SSLContext", self._context).wrap_socket(
                self._socket,
                server_hostname=self.server.host,
                do_handshake_on_connect=False,
            )
            self._in_time(lambda _: sock.do_handshake(), deadline)
        except ssl.SSLCertVerificationError as error:
            raise DeliveryError(
                f"The certificate of {self.server} is not to be trusted:"
                f" {error.verify_message.rstrip('.')}. Ask for the host by the name in"
                " its certificate, and name the file of the CA if it is your own."
            ) from None
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, cause: object) -> ConnectionLost:
        """Close the connection and make the exception that says why."""
        self.close()

        if isinstance(cause, TimeoutError):
            cause = f"it took more than {self.server.timeout:g} s"

        return ConnectionLost(
            f"The connection to {self.server} failed at {self._stage}: {cause}."
        )


def with_crlf(content: bytes) -> bytes:
    """Make every line end what :rfc:`5321#section-2.3.8` asks for."""
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return lines.replace(b"\n", b"\r\n")


def finish(content: bytes) -> bytes:
    """Double leading dots and add the final one, see :rfc:`5321#section-4.5.2`."""
    end = b".\r\n" if content.endswith(b"\r\n") else b"\r\n.\r\n"
    return (b"\r\n" + content).replace(b"\r\n.", b"\r\n..")[2:] + end
