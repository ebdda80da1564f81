from __future__ import annotations

import contextlib
import functools
import smtplib
import time
import typing as t

from ..exceptions import DeliveryError
from ..exceptions import DeliveryUnknown
from .envelope import divide
from .envelope import dot_stuff
from .replies import Reply
from .stream import ConnectionLost
from .stream import SMTPStream

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .envelope import Envelope
    from .envelope import SMTPSettings

# The stages before a server is ready for a message.
OPENING = {"connect", "greeting", "TLS", "EHLO", "STARTTLS", "AUTH"}
# Maximum bytes of pipelined commands to write before reading their replies. They fit
# into any kernel's send buffer. So client and server never deadlock, each waiting for
# the other to read (RFC 2920, section 3.1).
_GROUP = 8_192
_QUIT_TIMEOUT = 1.0


class SMTPSession(SMTPStream):
    """A dialogue with a mail server: :meth:`open`, :meth:`deliver`, :meth:`end`.

    A closed session can be opened again. For one thread at a time. A message takes two
    round trips if the server offers ``PIPELINING`` (:rfc:`2920`), and otherwise three
    plus one per recipient.

    The text of an exception holds no address or credential: they are masked in the
    server's words, which may quote them.
    """

    def __init__(self, settings: SMTPSettings) -> None:
        super().__init__(settings)
        self._messages = 0
        # The thread that uses this session is opening it.
        self.opening = False
        # The server is ready for messages.
        self.let_in = False
        # When the server last took a message.
        self.taken_at = 0.0
        # No reply is due and no transaction is open: any command may follow.
        self._in_order = False
        # Refusals of one way to greet or to log in, kept while the next one is tried.
        self._refusals: list[Reply] = []

    def open(self) -> None:
        """Connect, switch to TLS and log in, according to the settings.

        :raises DeliveryError: One of these steps failed, and the session is closed.
        """
        settings = self.settings
        self.close()
        self._messages = 0
        self._refusals.clear()
        self.local_hostname = _local_hostname()
        self.set_debuglevel(settings.debug)
        self.opening = True

        try:
            self._connect()
            self._stage = "greeting"
            self._expect(*self.getreply())
            self._greet()

            if settings.use_tls:
                self._upgrade()

            if settings.username and settings.password:
                self._log_in(settings.username, settings.password)

            self.let_in = self._in_order = True
        except smtplib.SMTPResponseException as error:
            raise self._refused(self._stage, Reply(*error.args)) from None
        except ConnectionLost:
            # Some servers refuse one way, and hang up when the next one is tried.
            if not self._refusals:
                raise

            raise self._refused(self._stage, self._refusals[-1]) from None
        finally:
            self.opening = False

            if not self._in_order:
                self.close()

    def usable(self) -> bool:
        """Tell, without a round trip, whether another message can be sent."""
        limit = self.settings.max_messages
        is_worn = limit and self._messages >= limit
        return self._in_order and not is_worn and not self._is_dropped()

    def deliver(self, envelope: Envelope) -> None:
        """Send a message once.

        :raises DeliveryError: The server did not take it, or not for all recipients.
        :raises ConnectionLost: The connection broke before the server can have taken
            it.
        :raises DeliveryUnknown: The server had all of it, but gave no proper reply.
        """
        content = dot_stuff(envelope.content)
        # The size excludes the final dot. It includes doubled dots, which RFC 1870
        # would not count, so it is an upper bound.
        commands = self._commands(envelope, len(content) - 3)
        self._messages += 1
        self._in_order = False
        replies = self._start_transaction(commands)
        pairs = zip(envelope.recipients, replies[1:], strict=False)
        refused = {path: reply for path, reply in pairs if not reply.is_positive}
        self._check_start(envelope, replies, refused)
        self._stage = "message"
        # If send() raises ConnectionLost, the line with the final dot did not get out.
        self.send(content)
        self._check_end(envelope)

        if refused:
            number = f"{len(refused)} of {len(envelope.recipients)} recipients"
            what = f"The message was taken by {self.settings}, but not for {number}"
            raise self._refused_recipients(refused, what)

    def end(self, deadline: float) -> None:
        """Close the session, with a ``QUIT`` if the dialogue is ready for one.

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
        self.let_in = self._in_order = False
        super().close()

    def _greet(self) -> None:
        self._stage = "EHLO"
        # After STARTTLS, forget all that was learned in plain text.
        self.ehlo_resp = self.helo_resp = None
        self.does_esmtp = False
        reply = Reply(*self.ehlo())

        # Any 5xx is followed by HELO; a 4xx means "not now".
        if reply.code // 100 == 5:
            # A 500 or 502 only means that EHLO is unknown. Others may tell the cause.
            if reply.code not in {500, 502}:
                self._refusals.append(reply)

            reply = Reply(*self.helo())

        self._expect(*reply)
        self._refusals.clear()

    def _upgrade(self) -> None:
        self._stage = "STARTTLS"

        if not self.has_extn("starttls"):
            raise self._error(
                f"STARTTLS is not offered by {self.settings}, so nothing was sent."
                " MAIL_PORT may be wrong (587 is usual for STARTTLS), or something on"
                " the way removes the offer."
            )

        self._expect(*self.docmd("STARTTLS"))

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
        except (DeliveryError, smtplib.SMTPResponseException):
            raise
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
                self._refusals.append(Reply(*error.args))

            raise

    def _commands(self, envelope: Envelope, size: int) -> list[bytes]:
        """Return the command lines before the message; the last one is ``DATA``."""
        options = [f"SIZE={size}"] if self.has_extn("size") else []
        options += envelope.mail_options

        if not "".join([envelope.sender, *envelope.recipients]).isascii():
            if not self.has_extn("smtputf8"):
                self._stage = "MAIL"
                raise self._error(
                    "The message has a non-ASCII address and needs SMTPUTF8, which"
                    f" {self.settings} does not offer."
                )

            wanted = ("SMTPUTF8", "BODY=8BITMIME")
            options += [option for option in wanted if option not in options]

        sender = f"MAIL FROM:<{envelope.sender}>"
        recipients = [f"RCPT TO:<{path}>" for path in envelope.recipients]

        if self.does_esmtp:
            sender = " ".join([sender, *options])
            recipients = [" ".join([r, *envelope.rcpt_options]) for r in recipients]

        return [f"{line}\r\n".encode() for line in [sender, *recipients, "DATA"]]

    def _start_transaction(self, commands: list[bytes]) -> list[Reply]:
        """Send the commands, and return the replies up to the point of a refusal."""
        replies: list[Reply] = []
        limit = _GROUP if self.has_extn("pipelining") else 0

        for group in divide(commands, limit):
            self._stage = group[0][:4].decode()

            try:
                self.send(b"".join(group))

                for command in group:
                    self._stage = command[:4].decode()
                    replies.append(self.getreply())
            except ConnectionLost:
                # If the server refuses and then hangs up, the refusal still counts.
                if not _is_refused(replies, len(commands) - 2):
                    raise

            if _is_refused(replies, len(commands) - 2):
                break

        return replies

    def _check_start(
        self, envelope: Envelope, replies: list[Reply], refused: dict[str, Reply]
    ) -> None:
        """Raise if the message itself can't be sent."""
        sender, last = replies[0], replies[-1]

        if not sender.is_positive:
            error = self._refused("MAIL", sender, envelope.sender)
        elif len(refused) == len(envelope.recipients):
            count = len(refused)
            who = f"All {count} recipients were" if count > 1 else "The recipient was"
            what = f"{who} refused by {self.settings}"
            error = self._refused_recipients(refused, what)
        elif last.code != 354:
            error = self._refused("DATA", last)
        else:
            return

        if last.code == 354:
            # The server waits for a message, which it might deliver.
            self.close()
        else:
            self._reset()

        raise error

    def _check_end(self, envelope: Envelope) -> None:
        """Raise if the server did not take the message, or if that can't be known."""
        self._stage = "end of message"

        try:
            reply = self.getreply()

            if reply.code // 100 == 3:
                raise self._lost(f"{reply.code} is not a reply to a message")
        except ConnectionLost as lost:
            if lost.smtp_code == 421:
                raise

            raise DeliveryUnknown(
                f"The message may or may not have been delivered: {lost} The server"
                " already had all of it, so it is not sent again. Look for it in the"
                " server's log. If the server is slow, raise"
                f" {self.settings.timeout_key}.",
                stage=self._stage,
            ) from None

        if not reply.is_positive:
            addresses = [envelope.sender, *envelope.recipients]
            error = self._refused(self._stage, reply, *addresses)
            self._reset()
            raise error

        self.taken_at = self.heard_at
        self._in_order = True

    def _reset(self) -> None:
        """Abort a transaction, so that the next one can begin."""
        if self.sock is not None:
            with contextlib.suppress(ConnectionLost):
                self._stage = "RSET"
                self._in_order = Reply(*self.docmd("RSET")).is_positive


def end_all(
    sessions: cabc.Iterable[SMTPSession], deadline: float | None = None
) -> None:
    """Close sessions with a ``QUIT`` each, and one second for all the replies.

    A process that stops has little time, and nothing depends on the replies.

    :param deadline: When that second ends, by the monotonic clock.
    """
    deadline = deadline or time.monotonic() + _QUIT_TIMEOUT

    for session in sessions:
        session.end(deadline)


@functools.cache
def _local_hostname() -> str:
    # Cached, because smtplib asks DNS for the name with each connection. It can't send
    # a name outside ASCII.
    name = str(smtplib.LMTP().local_hostname)
    return name if name.isascii() else "[127.0.0.1]"


def _is_refused(replies: list[Reply], recipients: int) -> bool:
    """Tell whether the sender or every recipient was refused."""
    positive = [reply.is_positive for reply in replies[: recipients + 1]]
    return positive[:1] == [False] or (
        len(positive) > recipients and not any(positive[1:])
    )
