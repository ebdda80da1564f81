from __future__ import annotations

import asyncio
import collections
import contextlib
import enum
import re
import socket
import struct
import threading
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te

# Seconds after which a server that does not do as it is told has failed.
_PATIENCE: t.Final = 10.0
# Seconds between two bytes of a server that trickles.
_TRICKLE: t.Final = 0.05

_MESSAGE_ID: t.Final = re.compile(rb"^Message-ID: (<[^>]*>)", re.IGNORECASE | re.M)


class Mood(enum.Enum):
    """What a mail server does to those who have something to send."""

    HEALTHY = "healthy"
    REFUSES = "refuses connections"
    HANGS = "hangs"
    RESETS = "resets"
    TRICKLES = "trickles"
    FULL = "is full (452)"


class MailServer:
    """A mail server that writes down every message before it says that it took it.

    What it has written is authoritative: a message is delivered if it is there. A
    client that is gone before its message is written down has lost it, where other
    servers may be kinder, so that no loss is hidden.

    :param port: From :func:`reserve_port`.
    :param delay: Seconds that it takes for a message, half of it before it is written
        down, and half of it after.
    """

    def __init__(self, port: int, *, delay: float) -> None:
        self._port = port
        self._delay = delay
        # Of the loop's thread, and only read by others.
        self.delivered: collections.Counter[str] = collections.Counter()
        self.trickled = 0
        self._mood = Mood.HEALTHY
        self._listener: asyncio.Server | None = None
        self._conversations: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> te.Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop.close()

    def set_mood(self, mood: Mood) -> None:
        """Change the behaviour from now on, for open connections too."""
        self._call(self._set_mood(mood))

    def _call(self, coroutine: cabc.Coroutine[t.Any, t.Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_PATIENCE)

    async def _set_mood(self, mood: Mood) -> None:
        self._mood, former = mood, self._mood

        if mood is Mood.REFUSES:
            await self._close()
        elif former is Mood.REFUSES:
            await self._listen()
        elif former is Mood.HANGS:
            await self._hang_up()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._serve, "127.0.0.1", self._port, reuse_port=True, backlog=128
        )

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

        await self._hang_up()

    async def _hang_up(self) -> None:
        conversations = dict(self._conversations)

        for conversation, writer in conversations.items():
            writer.transport.abort()
            conversation.cancel()

        await asyncio.gather(*conversations, return_exceptions=True)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        conversation = t.cast("asyncio.Task[None]", asyncio.current_task())
        self._conversations[conversation] = writer

        try:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await self._converse(reader, writer)
        finally:
            del self._conversations[conversation]
            writer.close()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._reply(writer, "220 ledger.example ESMTP")
        sender = False

        while line := await reader.readline():
            verb = line[:4].upper()

            if verb == b"EHLO":
                reply = "250-ledger.example\r\n250 PIPELINING"
            elif verb == b"MAIL":
                sender = self._mood is not Mood.FULL
                reply = "250 2.1.0 ok" if sender else "452 4.3.1 the disk is full"
            elif verb in (b"RCPT", b"DATA") and not sender:
                reply = "503 5.5.1 no sender"
            elif verb == b"DATA":
                await self._reply(writer, "354 go ahead")
                content = await reader.readuntil(b"\r\n.\r\n")
                reply = await self._take(reader, content)
            elif verb == b"QUIT":
                await self._reply(writer, "221 2.0.0 bye")
                break
            else:
                reply = "250 2.0.0 ok"

            await self._reply(writer, reply)

    async def _take(self, reader: asyncio.StreamReader, content: bytes) -> str:
        await asyncio.sleep(self._delay / 2)

        if reader.at_eof():
            raise ConnectionError("The client is gone.")

        found = _MESSAGE_ID.search(content)
        assert found is not None
        self.delivered[found[1].decode()] += 1
        await asyncio.sleep(self._delay / 2)
        return "250 2.0.0 taken"

    async def _reply(self, writer: asyncio.StreamWriter, reply: str) -> None:
        octets = f"{reply}\r\n".encode()

        if self._mood is Mood.HANGS:
            await asyncio.Event().wait()

        if self._mood is Mood.RESETS:
            sock = writer.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            raise ConnectionError("It is reset.")

        while self._mood is Mood.TRICKLES and octets:
            writer.write(octets[:1])
            octets = octets[1:]
            await asyncio.sleep(_TRICKLE)

        self.trickled += self._mood is Mood.TRICKLES
        writer.write(octets)


@contextlib.contextmanager
def reserve_port() -> cabc.Iterator[int]:
    """Hold a port for a mail server that is not always there."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
