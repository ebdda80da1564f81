from __future__ import annotations

import contextlib
import typing as t

from ..exceptions import DeliveryUnknown
from .connection import SMTPConnection
from .replies import Reply
from .stream import ConnectionLost

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from ..exceptions import DeliveryError
    from .envelope import Envelope

# Maximum bytes of pipelined commands to write before reading their replies. They fit
# into any kernel's send buffer. So client and server never deadlock, each waiting for
# the other to read (RFC 2920, section 3.1).
_GROUP = 8_192


class SMTPSession(SMTPConnection):
    """A dialogue with a mail server: :meth:`open`, :meth:`deliver`, :meth:`end`.

    A closed session can be opened again. For one thread at a time. A message takes two
    round trips if the server offers ``PIPELINING`` (:rfc:`2920`), and otherwise three
    plus one per recipient.

    The text of an exception holds no address or credential: they are masked in the
    server's words, which may quote them.
    """

    # When the server last took a message.
    taken_at = 0.0

    def deliver(self, envelope: Envelope) -> None:
        """Send a message once.

        :raises DeliveryError: The server did not take it, or not for all recipients.
        :raises ConnectionLost: The connection broke before the server can have taken
            it.
        :raises DeliveryUnknown: The server had all of it, but gave no proper reply.
        """
        content = _dot_stuff(envelope.content)
        # The size excludes the final dot. It includes doubled dots, which RFC 1870
        # would not count, so it is an upper bound.
        commands = self._commands(envelope, len(content) - 3)
        self._messages += 1
        self._in_order = False
        refused = self._start_transaction(envelope, commands)
        self._stage = "message"
        # If send() raises ConnectionLost, the line with the final dot did not get out.
        self.send(content)
        self._check_end(envelope)

        if refused:
            number = f"{len(refused)} of {len(envelope.recipients)} recipients"
            what = f"The message was taken by {self.settings}, but not for {number}"
            raise self._refused_recipients(refused, what)

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

    def _start_transaction(
        self, envelope: Envelope, commands: list[bytes]
    ) -> dict[str, Reply]:
        """Send the commands, and return the refused recipients.

        :raises DeliveryError: The message itself can't be sent.
        """
        replies: list[Reply] = []
        error: DeliveryError | None = None

        for group in _divide(commands, _GROUP if self.has_extn("pipelining") else 0):
            self._stage = group[0][:4].decode()

            try:
                self.send(b"".join(group))

                for command in group:
                    self._stage = command[:4].decode()
                    replies.append(self.getreply())
            except ConnectionLost:
                # If the server refuses and then hangs up, the refusal still counts.
                if self._find_refusal(envelope, replies) is None:
                    raise

            if error := self._find_refusal(envelope, replies):
                break

        last = replies[-1]

        if error is None and last.code == 354:
            return _find_refused(envelope, replies)

        if last.code == 354:
            # The server waits for a message, which it might deliver.
            self.close()
        else:
            self._reset()

        raise error or self._refused("DATA", last)

    def _find_refusal(
        self, envelope: Envelope, replies: list[Reply]
    ) -> DeliveryError | None:
        """Return an error if the sender or every recipient was refused."""
        if replies and not replies[0].is_positive:
            return self._refused("MAIL", replies[0], envelope.sender)

        refused = _find_refused(envelope, replies)

        if len(refused) < len(envelope.recipients):
            return None

        count = len(refused)
        who = f"All {count} recipients were" if count > 1 else "The recipient was"
        return self._refused_recipients(refused, f"{who} refused by {self.settings}")

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


def _find_refused(envelope: Envelope, replies: list[Reply]) -> dict[str, Reply]:
    pairs = zip(envelope.recipients, replies[1:], strict=False)
    return {path: reply for path, reply in pairs if not reply.is_positive}


def _dot_stuff(content: bytes) -> bytes:
    """Make every line ending CRLF, double leading dots, and add the final dot.

    See :rfc:`5321#section-2.3.8` and section 4.5.2.
    """
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = (b"\n" + lines).replace(b"\n.", b"\n..").replace(b"\n", b"\r\n")[2:]
    return lines + (b".\r\n" if lines.endswith(b"\r\n") else b"\r\n.\r\n")


def _divide(commands: list[bytes], limit: int) -> cabc.Iterator[list[bytes]]:
    """Divide commands into groups of at most ``limit`` bytes, or of one command."""
    group: list[bytes] = []

    for command in commands:
        if group and sum(map(len, group)) + len(command) > limit:
            yield group
            group = []

        group.append(command)

    yield group
