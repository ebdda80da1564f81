from __future__ import annotations

import asyncio
import email
import email.policy
import socket
import threading
import typing as t

from aiosmtpd.smtp import SMTP

if t.TYPE_CHECKING:
    from email.message import EmailMessage

    from aiosmtpd.smtp import Envelope
    from aiosmtpd.smtp import Session

# Seconds after which a server that does not start or stop has failed.
_PATIENCE = 10.0


class _Protocol(SMTP):
    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__(mailbox, hostname="localhost", enable_SMTPUTF8=True)
        self._transports = mailbox.transports

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transports.add(t.cast("asyncio.Transport", transport))
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transports.discard(t.cast("asyncio.Transport", self.transport))
        super().connection_lost(error)


class Mailbox:
    """A real mail server, on a thread of its own: what it took, and from whom."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []
        self.recipients: list[list[str]] = []
        self.sessions: list[Session] = []
        self.refused: set[str] = set()
        self.transports: set[asyncio.Transport] = set()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._serving = threading.Event()

    def __enter__(self) -> Mailbox:
        self._thread.start()
        assert self._serving.wait(_PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive()

    def lock(self) -> None:
        """Leave final dots unanswered from now on."""
        self._loop.call_soon_threadsafe(self._unlocked.clear)

    def unlock(self) -> None:
        """Answer them again."""
        self._loop.call_soon_threadsafe(self._unlocked.set)

    @property
    def subjects(self) -> list[str]:
        return [str(message["Subject"]) for message in self.messages]

    async def handle_RCPT(
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        address: str,
        options: list[str],
    ) -> str:
        if address in self.refused:
            return "550 5.1.1 no such user"

        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        await self._unlocked.wait()
        content = t.cast("bytes", envelope.content)
        message = email.message_from_bytes(content, policy=email.policy.default)
        self.messages.append(message)
        self.recipients.append(sorted(map(str, envelope.rcpt_tos)))
        self.sessions.append(session)
        return "250 OK"

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._unlocked = asyncio.Event()
        self._unlocked.set()
        server = await self._loop.create_server(
            lambda: _Protocol(self), sock=self._socket
        )
        self._serving.set()
        await self._stop.wait()
        server.close()

        while self.transports:
            for transport in list(self.transports):
                transport.abort()

            await asyncio.sleep(0)
