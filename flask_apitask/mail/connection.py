from __future__ import annotations

import contextlib
import functools
import smtplib
import socket
import ssl
import time
import typing as t

from ..exceptions import DeliveryError
from .replies import Reply
from .stream import ConnectionLost
from .stream import SMTPStream

if t.TYPE_CHECKING:
    import collections.abc as cabc

# The stages before a server is ready for a message.
OPENING = {"connect", "greeting", "TLS", "EHLO", "STARTTLS", "AUTH"}
_QUIT_TIMEOUT = 1.0


class SMTPConnection(SMTPStream):
    """Greets a mail server, switches to TLS, logs in, and in the end says ``QUIT``."""

    # Whether the thread that uses this connection is opening it.
    opening = False
    # No reply is due and no transaction is open: any command may follow.
    _in_order = False
    # Messages that were begun on this connection.
    _messages = 0
    # The refusal of one way to greet or to log in, while the next one is tried.
    _refusal: Reply | None = None

    @property
    def let_in(self) -> bool:
        """Whether the connection is open, and the server was ready for messages."""
        return self.sock is not None and not self.opening

    def open(self) -> None:
        """Connect, switch to TLS and log in, according to the settings.

        :raises DeliveryError: One of these steps failed, and the connection is closed.
        """
        settings = self.settings
        self._messages, self._refusal = 0, None
        self.local_hostname = _local_hostname()
        self.set_debuglevel(settings.debug)
        self.opening = True

        try:
            self._connect()
            self._stage = "greeting"
            self._expect(self.getreply())
            self._greet()

            if settings.use_tls:
                self._upgrade()

            if settings.username and settings.password:
                self._log_in(settings.username, settings.password)

            self._in_order = True
        except ConnectionLost:
            # Some servers refuse one way, and hang up when the next one is tried.
            if self._refusal is None:
                raise

            raise self._refused(self._stage, self._refusal) from None
        finally:
            if not self._in_order:
                self.close()

            self.opening = False

    def usable(self) -> bool:
        """Tell, without a round trip, whether another message can be sent."""
        limit = self.settings.max_messages
        is_worn = limit and self._messages >= limit
        return self._in_order and not is_worn and not self._is_dropped()

    def end(self, deadline: float) -> None:
        """Close the connection, with a ``QUIT`` if the dialogue is ready for one.

        Never raises: messages taken before are delivered, whether this works or not.

        :param deadline: When to stop waiting for the reply, by the monotonic clock.
        """
        self._deadline = deadline

        try:
            if self._in_order:
                with contextlib.suppress(ConnectionLost):
                    self._stage = "QUIT"
                    self.docmd("QUIT")
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket without ``QUIT``, with no effect on a forked process."""
        self._in_order = False

        with contextlib.suppress(OSError):
            super().close()

    def _connect(self) -> None:
        self._stage = "connect"
        self._received, self._deadline = b"", None
        address = self.settings.host, self.settings.port

        try:
            self.sock = socket.create_connection(address, self.settings.timeout)
            # The end of a chunk must not wait for a delayed acknowledgement.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, UnicodeError) as error:
            raise self._lost(error) from None

        if self.settings.use_ssl:
            self._start_tls()

    def _start_tls(self) -> None:
        self._stage = "TLS"
        context = t.cast("ssl.SSLContext", self.settings.tls_context())
        self.sock.settimeout(self.settings.timeout)
        host = self.settings.host

        try:
            self.sock = context.wrap_socket(self.sock, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise self._error(
                f"The certificate of {self.settings} could not be verified:"
                f" {error.verify_message.rstrip('.')}. Set MAIL_SERVER to a name in the"
                " certificate, or APITASK_MAIL_TLS_VERIFY to your CA file."
            ) from None
        except OSError as error:
            raise self._lost(error) from None

    def _greet(self) -> None:
        self._stage = "EHLO"
        # After STARTTLS, forget what was learned in plain text.
        self.does_esmtp = False
        reply = Reply(*self.ehlo())

        # Any 5xx is followed by HELO; a 4xx means "not now".
        if reply.code // 100 == 5:
            # A 500 or 502 only means that EHLO is unknown. Others may tell the cause.
            self._refusal = None if reply.code in {500, 502} else reply
            reply = Reply(*self.helo())

        self._expect(reply)
        self._refusal = None

    def _upgrade(self) -> None:
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
                " was sent. The server is broken, or something on the way forges"
                " replies."
            )

        self._start_tls()
        self._greet()

    def _log_in(self, username: str, password: str) -> None:
        """Log in, with one timeout for all the steps, which may be many."""
        self._stage = "AUTH"
        self._deadline = time.monotonic() + self.settings.timeout
        self.set_debuglevel(0)

        try:
            self.login(username, password)
        except DeliveryError:
            raise
        except smtplib.SMTPResponseException as error:
            raise self._refused("AUTH", Reply(*error.args)) from None
        except UnicodeEncodeError:
            raise self._error(
                f"MAIL_USERNAME or MAIL_PASSWORD for {self.settings} has a non-ASCII"
                " character, with which smtplib can't log in."
            ) from None
        except (smtplib.SMTPException, ValueError):
            raise self._error(
                f"smtplib knows none of the ways to log in that {self.settings} offers."
                " If the server offers one only over TLS, set MAIL_USE_TLS; if it needs"
                " no log-in, remove MAIL_USERNAME."
            ) from None
        finally:
            self._deadline = None
            self.set_debuglevel(self.settings.debug)

    def auth(self, *args: t.Any, **kwargs: t.Any) -> tuple[int, bytes]:
        """Try one way to log in. If it is refused, smtplib tries the next one."""
        try:
            return super().auth(*args, **kwargs)
        except smtplib.SMTPAuthenticationError as error:
            # A 504 only means that the server does not support this way to log in.
            if error.smtp_code != 504:
                self._refusal = Reply(*error.args)

            raise

    def _expect(self, reply: Reply) -> None:
        if not reply.is_positive:
            raise self._refused(self._stage, reply)


def end_all(
    connections: cabc.Iterable[SMTPConnection], deadline: float | None = None
) -> None:
    """Close connections with a ``QUIT`` each, and one second for all the replies.

    A process that stops has little time, and nothing depends on the replies.

    :param deadline: When that second ends, by the monotonic clock.
    """
    deadline = deadline or time.monotonic() + _QUIT_TIMEOUT

    for connection in connections:
        connection.end(deadline)


@functools.cache
def _local_hostname() -> str:
    # Cached, because smtplib asks DNS for the name with each connection. It can't send
    # a name outside ASCII.
    name = str(smtplib.LMTP().local_hostname)
    return name if name.isascii() else "[127.0.0.1]"
