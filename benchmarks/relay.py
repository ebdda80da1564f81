"""A TCP relay that makes a connection over loopback as slow as one to a distant host.

Every byte leaves half a round trip after it has arrived, in each direction. The
handshake of TCP itself is not delayed: to open a connection seems a round trip cheaper
than it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import selectors
import socket
import sys
import threading
import time
import typing as t

from . import beside

CHUNK: t.Final = 65_536


@dataclasses.dataclass(eq=False)
class Pair:
    """A connection of a client and the one to the server that belongs to it."""

    client: socket.socket
    server: socket.socket
    ends: int = 0
    # The client has been sent something that it may have waited for.
    answered: bool = False

    def other(self, sock: socket.socket) -> socket.socket:
        """Return the socket at which leaves what arrives at *sock*."""
        return self.server if sock is self.client else self.client

    def close(self) -> None:
        """Close both."""
        self.client.close()
        self.server.close()


class Relay:
    """Relay what *listener* accepts, for the length of a ``with`` block.

    One thread receives and one sends. Between them is one queue: as the delay is the
    same for all chunks, the one that arrived first is due first, whatever its
    connection, so no chunk waits for the delay of another.

    Sending blocks. It is for mail, which fits into the buffers of the system.

    :param port: where the server listens on this host.
    :param round_trip: seconds.
    """

    def __init__(self, listener: socket.socket, port: int, round_trip: float) -> None:
        self.flights = 0
        self._listener = listener
        self._port = port
        self._delay = round_trip / 2
        self._pairs: set[Pair] = set()
        self._stop, self._stopped = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self._due: queue.SimpleQueue[tuple[float, Pair, socket.socket, bytes] | None]
        self._due = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"relay-{target.__name__}")
            for target in (self._receive, self._send)
        ]

    @property
    def open(self) -> int:
        """How many connections are open at either end."""
        return len(self._pairs)

    def __enter__(self) -> Relay:
        for thread in self._threads:
            thread.start()

        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.close()

        for thread in self._threads:
            thread.join(beside.END_SECONDS)

        self._stopped.close()
        self._selector.close()

        for pair in self._pairs:
            pair.close()

    def _receive(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._stopped:
                    self._due.put(None)
                    return

                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._receive_chunk(t.cast("socket.socket", key.fileobj), key.data)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection((beside.HOST, self._port), beside.END_SECONDS)
        pair = Pair(client, server)
        self._pairs.add(pair)

        for sock in (pair.client, pair.server):
            sock.settimeout(beside.END_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ, pair)

    def _receive_chunk(self, sock: socket.socket, pair: Pair) -> None:
        try:
            chunk = sock.recv(CHUNK)
        except OSError:
            chunk = b""

        if not chunk:
            self._selector.unregister(sock)
        elif sock is pair.client and pair.answered:
            pair.answered = False
            self.flights += 1

        self._due.put((time.monotonic() + self._delay, pair, pair.other(sock), chunk))

    def _send(self) -> None:
        while (due := self._due.get()) is not None:
            at, pair, sock, chunk = due
            time.sleep(max(0.0, at - time.monotonic()))

            # The receiving thread notices when a peer has gone.
            with contextlib.suppress(OSError):
                if chunk:
                    pair.answered |= sock is pair.client
                    sock.sendall(chunk)
                else:
                    sock.shutdown(socket.SHUT_WR)

            if not chunk:
                self._end(pair)

    def _end(self, pair: Pair) -> None:
        pair.ends += 1

        # The receiving thread has let go of a socket before its end comes here.
        if pair.ends == 2:
            pair.close()
            self._pairs.discard(pair)


def beside_us(port: int, round_trip: float) -> contextlib.AbstractContextManager[int]:
    """Run a relay in a process of its own; give the port at which it listens."""
    return beside.listening(__name__, str(port), str(round_trip))


def main() -> None:
    """Relay until the parent process is done."""
    fileno, port, round_trip = sys.argv[1:]

    with (
        socket.socket(fileno=int(fileno)) as listener,
        Relay(listener, int(port), float(round_trip)),
    ):
        beside.wait_for_end()


if __name__ == "__main__":
    main()
