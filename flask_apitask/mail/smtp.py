from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import smtplib
import time
import typing as t

from ..exceptions import DeliveryError
from ..exceptions import DeliveryUnknown
from .wire import ConnectionLost
from .wire import finish
from .wire import Wire
from .wire import with_crlf

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import ssl

    from .envelope import Envelope
    from .envelope import Server
    from .wire import Reply

logger = logging.getLogger(__name__)

# Bytes of pipelined commands written before their replies are read. They fit into the
# send buffer of any kernel, so that a server which waits for its replies to be read
# never meets a client that waits for its commands to be (RFC 2920, section 3.1).
_GROUP = 8_192
# Seconds to wait for the reply to QUIT. Nothing depends on it any more.
_QUIT_TIMEOUT = 1.0

_ENHANCED_CODE = re.compile(rb"[245]\.[0-9]{1,3}\.[0-9]{1,3}(?![0-9.])")


class Connection(Wire):
    """One SMTP session: :meth:`open` it, :meth:`deliver` messages, :meth:`end` it.

    It is for one thread at a time. A message takes two round trips where the server
    offers ``PIPELINING`` (:rfc:`2920`), else three and one per recipient.

    :param context: From :meth:`.Server.tls_context`.
    :param local_hostname: The name for ``EHLO``. smtplib asks DNS for it each time.
    """

    def __init__(
        self, server: Server, *, context: ssl.SSLContext | None, local_hostname: str
    ) -> None:
        super().__init__(server, context=context, local_hostname=local_hostname)
        self.messages = 0
        # No reply is due and no transaction is open: any command may follow.
        self._in_order = False

    def open(self) -> None:
        """Connect, switch to TLS and log in, as the server's settings say.

        :raises DeliveryError: Something of it failed, and the connection is closed.
        """
        try:
            self._connect()
            self._stage = "the greeting"
            self._expect(self.getreply(), "The connection")
            self._greet()

            if self.server.use_tls:
                self._upgrade()

            if self.server.username and self.server.password:
                self._authenticate(self.server.username, self.server.password)
        except BaseException:
            self.close()
            raise

        self._in_order = True

    def usable(self) -> bool:
        """Tell whether another message can be sent, without a round trip."""
        limit = self.server.max_messages
        return (
            self._in_order
            and self.pid == os.getpid()
            and (not limit or self.messages < limit)
            and not self._has_news()
        )

    def deliver(self, envelope: Envelope) -> None:
        """Send a message once.

        :raises DeliveryError: The server did not take it, or not for all recipients.
        :raises ConnectionLost: The server can't have taken it.
        :raises DeliveryUnknown: The server had all of it, and gave no proper reply.
        """
        content = with_crlf(envelope.content)
        commands = self._commands(envelope, len(content))
        self.messages += 1
        self._in_order = False
        replies = self._offer(commands)
        self._check_offer(envelope, replies)
        self._stage = "the message"
        # A ConnectionLost up to here says that the line with the dot did not get out.
        self.send(finish(content))
        self._check_end()
        refused = [reply for reply in replies[1:-1] if not _is_positive(reply)]

        if refused:
            raise DeliveryError(
                f"The message was taken by {self.server}, but not for {len(refused)} of"
                f" {len(envelope.recipients)} recipients: {_codes(refused)}."
            )

    def end(self) -> None:
        """Close the connection, with ``QUIT`` if the dialogue is at a place for it.

        Never raises: what was taken before is delivered, whether this works or not.
        """
        if self._in_order and self.pid == os.getpid():
            self._deadline = time.monotonic() + min(_QUIT_TIMEOUT, self.server.timeout)

            try:
                with contextlib.suppress(ConnectionLost):
                    self.docmd("QUIT")
            finally:
                self.close()

        self.close()

    def close(self) -> None:
        self._in_order = False
        super().close()

    def _expect(self, reply: Reply, what: str) -> None:
        if not _is_positive(reply):
            raise DeliveryError(
                f"{what} was refused by {self.server}: {_codes([reply])}."
            )

    def _greet(self) -> None:
        self._stage = "EHLO"
        self.does_esmtp = False
        reply = self.ehlo()

        if not _is_positive(reply):
            reply = self.helo()

        self._expect(reply, "EHLO")

    def _upgrade(self) -> None:
        """Switch to TLS. Nothing learned or received before it counts after it."""
        if not self.has_extn("starttls"):
            raise DeliveryError(
                f"STARTTLS is not offered by {self.server}, so nothing was sent. It is"
                " the wrong port, or someone in between removes the offer."
            )

        self._stage = "STARTTLS"
        self._expect(self.docmd("STARTTLS"), "STARTTLS")

        if self._received:
            raise DeliveryError(
                f"Plain text follows the STARTTLS reply of {self.server}, so nothing"
                " was sent. It is broken, or someone in between forges replies."
            )

        self._start_tls()
        self._greet()

    def _authenticate(self, username: str, password: str) -> None:
        """Log in, with one timeout for all of it: servers may ask many questions."""
        self._stage = "AUTH"
        self._deadline = time.monotonic() + self.server.timeout
        self.set_debuglevel(0)

        try:
            self.login(username, password)
        except ConnectionLost:
            raise
        except smtplib.SMTPResponseException as error:
            raise DeliveryError(
                f"The user name or the password was refused by {self.server}:"
                f" {_codes([(error.smtp_code, t.cast('bytes', error.smtp_error))])}."
            ) from None
        except UnicodeEncodeError:
            raise DeliveryError(
                f"The user name or the password for {self.server} has a character"
                " outside of ASCII, and smtplib can't log in with it."
            ) from None
        except (smtplib.SMTPException, ValueError):
            raise DeliveryError(
                f"No way to log in that smtplib knows is offered by {self.server}. If"
                " it has none without TLS, switch TLS on; if it needs no log-in, leave"
                " the user name out."
            ) from None
        finally:
            self._deadline = None
            self.set_debuglevel(self.server.debug)

    def _commands(self, envelope: Envelope, size: int) -> list[bytes]:
        """Make the lines that go before the message, ``DATA`` the last of them."""
        options = list(envelope.mail_options)
        names = {option.partition("=")[0].upper() for option in options}

        if not "".join([envelope.sender, *envelope.recipients]).isascii():
            options += [] if "SMTPUTF8" in names else ["SMTPUTF8"]
            options += [] if "BODY" in names else ["BODY=8BITMIME"]
            names.add("SMTPUTF8")

        if "SMTPUTF8" in names and not self.has_extn("smtputf8"):
            raise DeliveryError(
                "The message needs SMTPUTF8, for an address outside of ASCII, and"
                f" {self.server} does not offer it."
            )

        if self.has_extn("size"):
            options.insert(0, f"SIZE={size}")

        if not self.does_esmtp:
            options = []

        rcpt_options = envelope.rcpt_options if self.does_esmtp else ()
        lines = [(f"MAIL FROM:{smtplib.quoteaddr(envelope.sender)}", *options)]
        lines += [
            (f"RCPT TO:{smtplib.quoteaddr(recipient)}", *rcpt_options)
            for recipient in envelope.recipients
        ]
        return [" ".join(line).encode() + b"\r\n" for line in [*lines, ("DATA",)]]

    def _offer(self, commands: list[bytes]) -> list[Reply]:
        """Send the commands and return a reply for each that was of use."""
        replies: list[Reply] = []
        groups = _groups(commands, _GROUP if self.has_extn("pipelining") else 0)

        for group in groups:
            if _is_hopeless(replies, len(commands)):
                break

            self._stage = group[0][:4].decode()
            self.send(b"".join(group))

            try:
                for command in group:
                    self._stage = command[:4].decode()
                    replies.append(self.getreply())
            except ConnectionLost:
                # Hanging up on the rest of a group does not take back a refusal.
                if not _is_hopeless(replies, len(commands)):
                    raise

        return replies

    def _check_offer(self, envelope: Envelope, replies: list[Reply]) -> None:
        """Raise if the message itself is not to be sent."""
        sender, *recipients = replies[: 1 + len(envelope.recipients)]

        for recipient, reply in zip(envelope.recipients, recipients, strict=False):
            if not _is_positive(reply):
                logger.debug("%s refused %s: %r", self.server, recipient, reply)

        if not _is_positive(sender):
            what, refused = "The sender", [sender]
        elif not any(map(_is_positive, recipients)):
            what, refused = f"Every recipient of {len(recipients)}", recipients
        elif replies[-1][0] != 354:
            what, refused = "The message", [replies[-1]]
        else:
            return

        asked = replies[-1][0] == 354

        if asked and any(map(_is_positive, recipients)):
            # The sender was refused, and yet a lone dot would be a message to these.
            self.close()
        else:
            self._reset("." if asked else "RSET")

        raise DeliveryError(f"{what} was refused by {self.server}: {_codes(refused)}.")

    def _check_end(self) -> None:
        """Raise if the server did not take the message, or if nobody can tell."""
        self._stage = "the end of the message"

        try:
            reply = self.getreply()

            if reply[0] // 100 == 3:
                raise self._lost(f"it is no answer to a message to say {reply[0]}")
        except ConnectionLost as lost:
            if lost.busy:
                raise

            raise DeliveryUnknown(
                f"The message may or may not be delivered: {lost} It was complete by"
                " then, so it is not sent again. Look for it in the log of the server,"
                " and allow a slow server a longer timeout."
            ) from None

        if not _is_positive(reply):
            self._reset("RSET")

        self._expect(reply, "The message")
        self._in_order = True

    def _reset(self, command: str) -> None:
        """End a transaction without a message, so that the next one can begin."""
        if self.sock is not None:
            with contextlib.suppress(ConnectionLost):
                self._stage = command
                reply = self.docmd(command)
                self._in_order = command == "." or _is_positive(reply)


def _is_positive(reply: Reply) -> bool:
    return reply[0] // 100 == 2


def _is_hopeless(replies: list[Reply], commands: int) -> bool:
    """Tell whether the sender was refused, or every recipient."""
    if not replies:
        return False

    recipients = replies[1 : commands - 1]
    return not _is_positive(replies[0]) or (
        len(recipients) == commands - 2 and not any(map(_is_positive, recipients))
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


def _codes(replies: list[Reply]) -> str:
    """Name the codes of replies and how often each came, without the text."""
    found = ((code, _ENHANCED_CODE.match(text)) for code, text in replies)
    counts = collections.Counter(
        f"{code} {match[0].decode()}" if match else f"{code}" for code, match in found
    )
    return ", ".join(
        code if count == 1 else f"{code} ({count} times)"
        for code, count in counts.items()
    )
