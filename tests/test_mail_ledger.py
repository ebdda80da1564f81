from __future__ import annotations

import collections
import concurrent.futures
import random
import threading
import typing as t

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import PATIENCE
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask.exceptions import DeliveryError
from flask_apitask.exceptions import DeliveryUnknown
from flask_apitask.mail import delivery
from flask_apitask.mail.pool import ConnectionPool

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.mail.envelope import Envelope

STAGES = [
    stage for stage in Stage if stage not in {Stage.STARTTLS, Stage.AUTH, Stage.RSET}
]
# Silence is left out, it would only take its time: it ends like a lost connection.
FAULTS = [fault for fault in Fault if fault not in {Fault.SILENCE, Fault.STALL}]

faults = st.tuples(st.sampled_from(STAGES), st.sampled_from(FAULTS))


class Send(t.NamedTuple):
    """A batch: how many recipients each of its messages has, and faults before each."""

    messages: list[tuple[int, list[tuple[Stage, Fault]]]]


class HangUp(t.NamedTuple):
    """The server closes all connections, or resets them."""

    reset: bool


batches = st.builds(
    Send,
    st.lists(st.tuples(st.integers(1, 3), st.lists(faults, max_size=3)), max_size=4),
)
actions = st.lists(st.one_of(batches, st.builds(HangUp, st.booleans())), max_size=8)


class Ledger:
    """What the client was told of each message."""

    def __init__(self) -> None:
        # Guards the list.
        self._lock = threading.Lock()
        self._told: list[tuple[Envelope, DeliveryError | None]] = []

    def send(self, connection: t.Any, envelope: Envelope) -> None:
        """Send, and write down how it ended."""
        told: DeliveryError | None = None

        try:
            connection.send(envelope)
        except DeliveryError as error:
            told = error

        with self._lock:
            self._told.append((envelope, told))

    def balance(self, server: ScriptedServer) -> collections.Counter[str]:
        """Compare with the books of the server; count what there was of each kind."""
        taken = collections.Counter(message.message_id for message in server.taken)
        reached = {message.message_id: message.recipients for message in server.taken}
        counts: collections.Counter[str] = collections.Counter()

        for envelope, error in self._told:
            message_id = envelope.message_id
            copies = taken.pop(message_id, 0)
            recipients = reached.get(message_id, ())
            assert copies <= 1, f"{message_id} was delivered {copies} times"

            if error is None:
                assert recipients == envelope.recipients, f"{message_id} was lost"
                counts["delivered"] += 1
            elif isinstance(error, DeliveryUnknown):
                # The server had it once, whatever it did with it.
                assert server.complete[message_id] >= 1
                counts["unknown"] += 1
            elif copies:
                assert "was taken by" in f"{error}"
                assert len(recipients) < len(envelope.recipients)
                counts["partly"] += 1
            else:
                counts["refused"] += 1

        assert not taken, "the server has messages that nobody sent"
        return counts


@pytest.fixture(scope="module", autouse=True)
def short_pauses() -> cabc.Iterator[None]:
    """Ask a server that has enough again at once: only the outcome counts here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "_FIRST_PAUSE", 0.001)
        patch.setattr(delivery, "_LONGEST_PAUSE", 0.001)
        yield


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("keepalive", [0, 30.0])
@settings(max_examples=60, deadline=None)
@given(plan=actions)
def test_the_ledger_balances(
    *, pipelining: bool, keepalive: float, plan: list[Send | HangUp]
) -> None:
    """No message is lost without an error, and none is delivered twice."""
    ledger = Ledger()

    with ScriptedServer(pipelining=pipelining) as server:
        pool = ConnectionPool(server.settings(), size=1, keepalive=keepalive)

        for action in plan:
            if isinstance(action, HangUp):
                server.reset() if action.reset else server.hang_up()
                continue

            with pool.connection() as connection:
                for recipients, planned in action.messages:
                    for stage, fault in planned:
                        server.fail(stage, fault)

                    names = (f"{number}@example.com" for number in range(recipients))
                    ledger.send(connection, make_envelope(*names))

        pool.close_idle()
        server.wait_for(lambda: server.open == 0)

    ledger.balance(server)


@pytest.mark.stress
def test_ten_thousand_messages() -> None:
    """The ledger of many threads and a server that fails all the time balances."""
    ledger = Ledger()
    total = 10_000
    dice = random.Random(42)

    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(timeout=PATIENCE), size=4)

        for _ in range(total // 4):
            server.fail(dice.choice(STAGES), dice.choice(FAULTS), *[None] * 3)

        def send_batch(size: int) -> None:
            with pool.connection() as connection:
                for _ in range(size):
                    ledger.send(connection, make_envelope("a@x.example", "b@x.example"))
                    # The server may not have noticed yet that one of them is closed.
                    assert len(pool._in_use) + len(pool._idle) <= 4

        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            batches = [executor.submit(send_batch, 5) for _ in range(total // 5)]

            for batch in batches:
                batch.result(PATIENCE * 30)

        pool.close_idle()

    counts = ledger.balance(server)
    assert counts.total() == total
    assert min(counts[kind] for kind in ("delivered", "unknown", "partly")) > 0
