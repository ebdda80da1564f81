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
# Bytes of pipelined commands written before their replies are read. They fit into the
# send buffer of any kernel, so that a server which waits for its replies to be read
# never meets a client that waits for its commands to be (RFC 2920, section 3.1).
_GROUP = 8_192
_QUIT_TIMEOUT = 1.0


class SMTPSession(SMTPStream):
    """A dialogue with a mail server: :meth:`open` it, :meth:`deliver`, :meth:`end`.

    One that was closed can be opened again. It is for one thread at a time. A message
    takes two round trips where the server offers ``PIPELINING`` (:rfc:`2920`), else
    three and one per recipient.

    No exception's text holds an address or a credential. The server's words, which may
    quote them, are masked in it.
    """

    def __init__(self, settings: SMTPSettings) -> None:
        super().__init__(settings)
        self._messages = 0
        # It is being opened, by the thread that it is for.
        self.opening = False
        # The server is ready for messages.
        self.let_in = False
        # When it last took one.
        self.taken_at = 0.0
        # No reply is due and no transaction is open: any command may follow.
        self._in_order = False
        # What was refused before another way to say hello or to log in is tried.
        self._refusals: list[Reply] = []

    def open(self) -> None:
        """Connect, switch to TLS and log in, as the settings say.

        :raises DeliveryError: Something of it failed, and the session is closed.
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
            # Some servers hang up on the other way.
            if not self._refusals:
                raise

            raise self._refused(self._stage, self._refusals[-1]) from None
        finally:
            self.opening = False

            if not self._in_order:
                self.close()

    def usable(self) -> bool:
        """Tell whether another message can be sent, without a round trip."""
        limit = self.settings.max_messages
        is_worn = limit and self._messages >= limit
        return self._in_order and not is_worn and not self._is_dropped()

    def deliver(self, envelope: Envelope) -> None:
        """Send a message once.

        :raises DeliveryError: The server did not take it, or not for all recipients.
        :raises ConnectionLost: The server can't have taken it.
        :raises DeliveryUnknown: The server had all of it, and gave no proper reply.
        """
        content = dot_stuff(envelope.content)
        # Without the final dot, and dots that are doubled don't count either.
        commands = self._commands(envelope, len(content) - 3)
        self._messages += 1
        self._in_order = False
        replies = self._start_transaction(commands)
        pairs = zip(envelope.recipients, replies[1:], strict=False)
        refused = {path: reply for path, reply in pairs if not reply.is_positive}
        self._check_start(envelope, replies, refused)
        self._stage = "message"
        # A ConnectionLost up to here says that the line with the dot did not get out.
        self.send(content)
        self._check_end(envelope)

        if refused:
            number = f"{len(refused)} of {len(envelope.recipients)} recipients"
            what = f"The message was taken by {self.settings}, but not for {number}"
            raise self._refused_recipients(refused, what)

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

    def close(self) -> None:
        """Close the socket without a word, and without an effect on a forked twin."""
        self.let_in = self._in_order = False
        super().close()

    def _greet(self) -> None:
        self._stage = "EHLO"
        # Nothing learned in plain text counts after STARTTLS.
        self.ehlo_resp = self.helo_resp = None
        self.does_esmtp = False
        reply = Reply(*self.ehlo())

        # One that says "not now" knows EHLO.
        if reply.code // 100 == 5:
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
                " was sent. It is broken, or something on the way forges replies."
            )

        self._start_tls()
        self._greet()

    def _log_in(self, username: str, password: str) -> None:
        """Log in, with one timeout for all of it: servers may ask many questions."""
        self._stage = "AUTH"
        self._deadline = time.monotonic() + self.settings.timeout
        self.set_debuglevel(0)

        try:
            self.login(username, password)
        except (DeliveryError, smtplib.SMTPResponseException):
            raise
        except UnicodeEncodeError:
            raise self._error(
                f"MAIL_USERNAME or MAIL_PASSWORD for {self.settings} has a character"
                " outside of ASCII, and smtplib can't log in with it."
            ) from None
        except (smtplib.SMTPException, ValueError):
            raise self._error(
                f"smtplib knows no way to log in that is offered by {self.settings}. If"
                " the server offers one only over TLS, set MAIL_USE_TLS; if it needs no"
                " log-in, leave out MAIL_USERNAME."
            ) from None
        finally:
            self._deadline = None
            self.set_debuglevel(self.settings.debug)

    def auth(self, *args: t.Any, **kwargs: t.Any) -> tuple[int, bytes]:
        """Log in one way; smtplib goes on to the next one if it is refused."""
        try:
            return super().auth(*args, **kwargs)
        except smtplib.SMTPAuthenticationError as error:
            self._refusals.append(Reply(*error.args))
            raise

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

        sender = f"MAIL FROM:<{envelope.sender}>"
        recipients = [f"RCPT TO:<{path}>" for path in envelope.recipients]

        if self.does_esmtp:
            sender = " ".join([sender, *options])
            recipients = [" ".join([r, *envelope.rcpt_options]) for r in recipients]

        return [f"{line}\r\n".encode() for line in [sender, *recipients, "DATA"]]

    def _start_transaction(self, commands: list[bytes]) -> list[Reply]:
        """Send the commands and return a reply for each that was of use."""
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
                # Hanging up on the rest of a group does not take back a refusal.
                if not _is_refused(replies, len(commands) - 2):
                    raise

            if _is_refused(replies, len(commands) - 2):
                break

        return replies

    def _check_start(
        self, envelope: Envelope, replies: list[Reply], refused: dict[str, Reply]
    ) -> None:
        """Raise if the message itself is not to be sent."""
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
                raise self._lost(f"{reply.code} is no answer to a message")
        except ConnectionLost as lost:
            if lost.smtp_code == 421:
                raise

            raise DeliveryUnknown(
                f"The message may or may not have been delivered: {lost} The server had"
                " all of it by then, so it is not sent again. Look for it in the"
                " server's log, and give a slow server longer"
                f" ({self.settings.timeout_key}).",
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
        """End a transaction without a message, so that the next one can begin."""
        if self.sock is not None:
            with contextlib.suppress(ConnectionLost):
                self._stage = "RSET"
                self._in_order = Reply(*self.docmd("RSET")).is_positive


def end_all(
    sessions: cabc.Iterable[SMTPSession], deadline: float | None = None
) -> None:
    """Close sessions, with a ``QUIT`` for each, and with one second for all replies.

    A process that stops has little time, and nothing depends on them any more.

    :param deadline: When this second is over, by the monotonic clock.
    """
    deadline = deadline or time.monotonic() + _QUIT_TIMEOUT

    for session in sessions:
        session.end(deadline)


@functools.cache
def _local_hostname() -> str:
    # smtplib asks DNS for it with each connection, and can't say all that it may get.
    name = str(smtplib.LMTP().local_hostname)
    return name if name.isascii() else "[127.0.0.1]"


def _is_refused(replies: list[Reply], recipients: int) -> bool:
    """Tell whether the sender was refused, or every recipient."""
    positive = [reply.is_positive for reply in replies[: recipients + 1]]
    return positive[:1] == [False] or (
        len(positive) > recipients and not any(positive[1:])
    )
