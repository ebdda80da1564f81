from __future__ import annotations

import contextlib
import pathlib
import socket
import time
import typing as t

import pytest
from conftest import PATIENCE
from conftest import wait_until

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from benchmarks.relay import Relay

ROOT: t.Final = pathlib.Path(__file__).parents[1]
ROUND_TRIP_SECONDS: t.Final = 0.1
CONNECTIONS: t.Final = 20


class Ends(t.NamedTuple):
    """A relay, where it listens, and what accepts the connections that it makes."""

    relay: Relay
    port: int
    server: socket.socket

    def connect(self, stack: contextlib.ExitStack) -> tuple[socket.socket, ...]:
        """Return the two ends of a connection through the relay."""
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        stack.enter_context(client)
        server, _ = self.server.accept()
        stack.enter_context(server).settimeout(PATIENCE)
        return client, server


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[Ends]:
    """Run a relay in this process."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.relay import Relay

    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
        Relay(listener, server.getsockname()[1], ROUND_TRIP_SECONDS) as relay,
    ):
        server.settimeout(PATIENCE)
        yield Ends(relay, listener.getsockname()[1], server)


def receive(sock: socket.socket, size: int) -> bytes:
    """Read that many bytes."""
    received = b""

    while len(received) < size:
        chunk = sock.recv(size - len(received))
        assert chunk
        received += chunk

    return received


def test_the_relay_delays_each_chunk_once(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte takes half a round trip each way, however many are on their way."""
    slept: list[float] = []
    sleep = time.sleep

    def note(seconds: float) -> None:
        slept.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)

    with contextlib.ExitStack() as stack:
        pairs = [ends.connect(stack) for _ in range(CONNECTIONS)]
        started = time.monotonic()

        for client, _ in pairs:
            client.sendall(b"?")

        for _, server in pairs:
            receive(server, 1)
            server.sendall(b"!")

        for client, _ in pairs:
            receive(client, 1)

        seconds = time.monotonic() - started

    assert seconds >= ROUND_TRIP_SECONDS
    # Delays that add up would make it twenty times the round trip.
    assert sum(slept) < ROUND_TRIP_SECONDS * CONNECTIONS / 2


def test_the_relay_keeps_the_order(ends: Ends) -> None:
    """What arrives is what was sent, then the end, and nothing is left open."""
    sent = b"".join(number.to_bytes(4, "big") for number in range(50_000))

    with contextlib.ExitStack() as stack:
        client, server = ends.connect(stack)
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert receive(server, len(sent)) == sent
        assert server.recv(1) == b""
        assert ends.relay.open == 1
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""

    # It closes its own sockets right after it has passed on the second end.
    wait_until(lambda: not ends.relay.open)


def test_the_relay_counts_round_trips(ends: Ends) -> None:
    """A client that has been answered since it spoke, and speaks, is a round trip."""
    with contextlib.ExitStack() as stack:
        client, server = ends.connect(stack)
        server.sendall(b"220")
        receive(client, 3)

        for _ in range(3):
            client.sendall(b"one")
            client.sendall(b"two")
            receive(server, 6)
            server.sendall(b"250")
            receive(client, 3)

    assert ends.relay.flights == 3
