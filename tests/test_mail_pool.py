from __future__ import annotations

import concurrent.futures
import gc
import os
import socket
import threading
import time
import typing as t

import pytest
from smtp_servers import Certificates
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import PATIENCE
from smtp_servers import run_script
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask.exceptions import DeliveryError
from flask_apitask.exceptions import DeliveryUnknown
from flask_apitask.mail import places
from flask_apitask.mail.envelope import Server
from flask_apitask.mail.pool import ConnectionPool
from flask_apitask.mail.wire import ConnectionLost

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

# Seconds of timeout for what is to run into it.
SHORT = 0.3


@pytest.fixture
def server() -> cabc.Iterator[ScriptedServer]:
    """Run a server that does as it is told."""
    with ScriptedServer() as scripted:
        yield scripted


@pytest.fixture
def pools(
    server: ScriptedServer,
) -> cabc.Iterator[cabc.Callable[..., ConnectionPool]]:
    """Make pools of connections to the server, which end with the test."""
    made = []

    def make(*, size: int = 4, keepalive: float = 30.0, **settings: t.Any) -> t.Any:
        pool = ConnectionPool(
            server.settings(**settings), size=size, keepalive=keepalive
        )
        made.append(pool)
        return pool

    yield make

    for pool in made:
        pool.close()


Pools = t.Callable[..., ConnectionPool]


def send(pool: ConnectionPool, *recipients: str) -> None:
    """Send one message."""
    with pool.connection() as connection:
        connection.send(make_envelope(*recipients))


class Holder:
    """A thread that holds a connection until it is told to let go."""

    def __init__(self, pool: ConnectionPool, *, sends: bool = True) -> None:
        self._pool = pool
        self._sends = sends
        self.has_it = threading.Event()
        self.let_go = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def end(self) -> None:
        self.let_go.set()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        try:
            with self._pool.connection() as connection:
                if self._sends:
                    connection.send(make_envelope())

                self.has_it.set()
                assert self.let_go.wait(PATIENCE)
        except BaseException as error:
            self.error = error


class WatchedEvent(threading.Event):
    """An event that tells when somebody begins to wait for it."""

    waited_for: t.ClassVar[threading.Semaphore]

    def wait(self, timeout: float | None = None) -> bool:
        self.waited_for.release()
        return super().wait(timeout)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Count those who wait for a connection."""
    WatchedEvent.waited_for = threading.Semaphore(0)
    watched = places._Waiter.__init__

    def init(self: places._Waiter) -> None:
        watched(self)
        self.called = WatchedEvent()

    monkeypatch.setattr(places._Waiter, "__init__", init)
    return WatchedEvent.waited_for


def test_a_connection_is_kept(server: ScriptedServer, pools: Pools) -> None:
    """Batches that follow each other share one connection."""
    pool = pools()

    for _ in range(3):
        send(pool)

    assert server.connects == 1
    assert len(server.taken) == 3
    assert f"{pool!r}" == (
        f"<ConnectionPool 'localhost:{server.port}' size=4 in_use=0 idle=1 waiting=0>"
    )


def test_a_batch_is_one_connection_in_order(
    server: ScriptedServer, pools: Pools
) -> None:
    """Without keepalive a batch still has one connection, and keeps its order."""
    pool = pools(keepalive=0)
    batch = [make_envelope() for _ in range(5)]

    with pool.connection() as connection:
        for envelope in batch:
            connection.send(envelope)

        assert "in_use=1 idle=0" in f"{pool!r}"

    assert "in_use=0 idle=0" in f"{pool!r}"
    assert [message.message_id for message in server.taken] == [
        envelope.message_id for envelope in batch
    ]
    send(pool)
    assert server.connects == 2
    assert server.quits == 2


def test_a_batch_of_nothing_opens_nothing(server: ScriptedServer, pools: Pools) -> None:
    """A connection is opened for the first message, and not before."""
    pool = pools()

    with pool.connection():
        pass

    assert server.connects == 0
    assert "in_use=0 idle=0" in f"{pool!r}"


def test_what_was_used_last_is_used_next(server: ScriptedServer, pools: Pools) -> None:
    """Of many idle connections one is used, so that the others can be closed."""
    pool = pools()
    holders = [Holder(pool) for _ in range(3)]

    for holder in holders:
        assert holder.has_it.wait(PATIENCE)

    for holder in holders:
        holder.end()

    with pool.connection() as first:
        used = first._connection

    for _ in range(3):
        with pool.connection() as again:
            assert again._connection is used

    assert server.connects == 3


def test_the_size_is_the_limit(server: ScriptedServer, pools: Pools) -> None:
    """Many threads share the connections that there may be at once."""
    pool = pools(size=2)

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        for future in [executor.submit(send, pool) for _ in range(40)]:
            future.result(PATIENCE)

    assert len(server.taken) == 40
    assert server.connects <= 2
    assert server.most_open <= 2


def test_close_has_no_time_for_all(
    server: ScriptedServer, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its time is over, closing a pool closes connections without a QUIT."""
    monkeypatch.setattr(places, "_CLOSE_TIMEOUT", -1.0)
    pool = pools()
    send(pool)
    pool.close()
    server.wait_for(lambda: server.open == 0)
    assert server.quits == 0


def test_the_size_is_the_limit_without_keepalive(
    server: ScriptedServer, pools: Pools
) -> None:
    """Without a keepalive a connection goes to who waits for it, and else is closed."""
    pool = pools(size=2, keepalive=0)

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        for future in [executor.submit(send, pool) for _ in range(40)]:
            future.result(PATIENCE)

    assert len(server.taken) == 40
    # Six of eight threads always wait, until the last sends.
    assert 2 <= server.connects < 20
    server.wait_for(lambda: server.open == 0)
    assert server.quits == server.connects


def test_waiters_are_served_in_order(pools: Pools, waits: threading.Semaphore) -> None:
    """Who came first gets the connection first, and one who comes last stands last."""
    pool = pools(size=1)
    first = Holder(pool)
    assert first.has_it.wait(PATIENCE)
    order: list[int] = []

    def wait_in_line(number: int) -> None:
        with pool.connection():
            order.append(number)

    threads = []

    for number in range(5):
        thread = threading.Thread(target=wait_in_line, args=[number])
        threads.append(thread)
        thread.start()
        assert waits.acquire(timeout=PATIENCE)

    assert "size=1 in_use=1 idle=0 waiting=5" in f"{pool!r}"
    first.end()

    for thread in threads:
        thread.join(PATIENCE)

    assert order == [0, 1, 2, 3, 4]


def test_waiter_gets_a_place_that_had_no_connection(
    server: ScriptedServer, pools: Pools, waits: threading.Semaphore
) -> None:
    """Who waits gets the place of one who has never sent, and opens a connection."""
    pool = pools(size=1)
    holder = Holder(pool, sends=False)
    assert holder.has_it.wait(PATIENCE)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        sent = executor.submit(send, pool)
        assert waits.acquire(timeout=PATIENCE)
        holder.end()
        sent.result(PATIENCE)

    assert server.connects == 1
    assert len(server.taken) == 1


def test_waiting_has_an_end(server: ScriptedServer, pools: Pools) -> None:
    """A wait past the timeout says how many are in use, and leaves the line."""
    pool = pools(size=1, timeout=SHORT)
    holder = Holder(pool)
    assert holder.has_it.wait(PATIENCE)

    with pytest.raises(DeliveryError) as caught:
        send(pool)

    assert f"{caught.value}" == (
        f"No connection to {pool.server} was free within 0.3 s: all 1 are in use and 0"
        " more wait. Allow more connections, or send less at once."
    )
    assert "waiting=0" in f"{pool!r}"
    holder.end()
    send(pool)
    assert server.connects == 1


def test_a_waiter_that_is_called_too_late(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that comes as the wait times out is used, and not lost (race 2)."""
    pool = pools(size=1)
    holder = Holder(pool)
    assert holder.has_it.wait(PATIENCE)

    class LateEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            holder.end()
            assert self.is_set()
            return False

    make = places._Waiter.__init__

    def init(self: places._Waiter) -> None:
        make(self)
        self.called = LateEvent()

    monkeypatch.setattr(places._Waiter, "__init__", init)
    send(pool)
    assert "in_use=0 idle=1 waiting=0" in f"{pool!r}"


class Interrupted(BaseException):
    """What a signal or the kill of a greenlet raises in the middle of anything."""


@pytest.mark.parametrize("called", ["no", "yes", "refused"])
def test_an_interrupted_wait(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    """Who is interrupted leaves the line, and gives back what it was given."""
    pool = pools(size=1)
    holder = Holder(pool)
    assert holder.has_it.wait(PATIENCE)

    class InterruptedEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if called == "yes":
                holder.end()
            elif called == "refused":
                pool.close()

            raise Interrupted

    make = places._Waiter.__init__

    def init(self: places._Waiter) -> None:
        make(self)
        self.called = InterruptedEvent()

    with monkeypatch.context() as patch:
        patch.setattr(places._Waiter, "__init__", init)

        with pytest.raises(Interrupted):
            send(pool)

    holder.end()
    assert "in_use=0" in f"{pool!r}"
    assert "waiting=0" in f"{pool!r}"
    assert f"idle={called != 'refused':d}" in f"{pool!r}"


def test_idle_connections_are_closed(server: ScriptedServer, pools: Pools) -> None:
    """After keepalive the server gets a QUIT, though no other message is sent."""
    pool = pools(keepalive=SHORT)
    holders = [Holder(pool) for _ in range(3)]

    for holder in holders:
        assert holder.has_it.wait(PATIENCE)

    for holder in holders:
        holder.end()

    began = time.monotonic()
    assert "idle=3" in f"{pool!r}"
    server.wait_for(lambda: server.quits == 3 and server.open == 0)
    assert time.monotonic() - began < SHORT * 3
    closer = pool._own_places().closer

    if closer is not None:
        closer.join(PATIENCE)

    assert pool._own_places().closer is None
    assert "in_use=0 idle=0" in f"{pool!r}"
    send(pool)
    assert server.connects == 4


def test_use_puts_the_end_off(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalive counts from the last use of a connection, by the clock."""
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pool = pools(keepalive=30)
    send(pool)
    own = pool._own_places()
    assert [until for until, _ in own.idle] == [1_030.0]
    now += 20
    send(pool)
    assert [until for until, _ in own.idle] == [1_050.0]


def test_the_closer_ends_as_a_connection_comes_back(
    server: ScriptedServer, pools: Pools
) -> None:
    """A connection that comes back when the closer has ended gets another (race 1)."""
    pool = pools(keepalive=SHORT / 3)

    for number in range(1, 4):
        send(pool)
        server.wait_for(lambda number=number: server.quits == number)  # type: ignore[misc]

    assert server.connects == 3


def test_no_thread_can_be_had(
    server: ScriptedServer, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a thread to close it a connection is kept until it is used or closed."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = pools(keepalive=SHORT / 3)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)

        with pool.connection() as connection:
            patch.undo()
            connection.send(make_envelope())
            patch.setattr(threading.Thread, "start", refuse)

    assert "idle=1" in f"{pool!r}"
    send(pool)
    server.wait_for(lambda: server.quits == 1)
    assert server.connects == 1


def test_closing(server: ScriptedServer, pools: Pools) -> None:
    """Closing ends idle connections and the closer, and can be done twice."""
    pool = pools()
    send(pool)
    closer = pool._own_places().closer
    assert closer is not None
    pool.close()
    assert not closer.is_alive()
    assert server.quits == 1
    pool.close()
    assert f"{pool!r}".endswith("size=4 in_use=0 idle=0 waiting=0 closed>")

    with pytest.raises(DeliveryError, match=r"pool of connections to .* is closed"):
        send(pool)


def test_closing_while_in_use(
    server: ScriptedServer, pools: Pools, waits: threading.Semaphore
) -> None:
    """A batch comes to its end, its connection is not kept, and who waits is told."""
    pool = pools(size=1)

    with pool.connection() as connection:
        connection.send(make_envelope())
        waiter = Holder(pool)
        assert waits.acquire(timeout=PATIENCE)
        pool.close()
        waiter.end()
        assert "is closed" in f"{waiter.error}"
        connection.send(make_envelope())

    assert len(server.taken) == 2
    assert server.quits == 1
    assert "in_use=0 idle=0" in f"{pool!r}"


def test_a_lease_ends_with_its_block(pools: Pools) -> None:
    """A connection that was given back can't be sent with."""
    with pools().connection() as connection:
        pass

    with pytest.raises(RuntimeError, match="was given back to its pool"):
        connection.send(make_envelope())


def test_a_dead_connection_is_replaced(server: ScriptedServer, pools: Pools) -> None:
    """A connection that the server has closed costs no message and no error."""
    pool = pools()
    send(pool)
    server.hang_up()
    send(pool)
    assert len(server.taken) == 2
    assert server.connects == 2
    assert "in_use=0 idle=1" in f"{pool!r}"


def test_a_connection_that_dies_in_use_is_replaced(
    server: ScriptedServer, pools: Pools
) -> None:
    """A kept connection that breaks before the message is complete is tried again."""
    pool = pools()
    send(pool)
    server.fail(Stage.DATA, Fault.RESET)
    send(pool)
    assert [len(message.recipients) for message in server.taken] == [1, 1]
    assert server.connects == 2


def test_the_second_attempt_is_the_last(server: ScriptedServer, pools: Pools) -> None:
    """What fails on a kept and then on a new connection is reported."""
    pool = pools()
    send(pool)
    server.fail(Stage.MAIL, Fault.DROP, Fault.DROP)

    with pool.connection() as connection:
        with pytest.raises(ConnectionLost, match="failed at MAIL") as caught:
            connection.send(make_envelope())

        connection.send(make_envelope())

    assert caught.value.__cause__ is None
    assert len(server.taken) == 2
    assert server.connects == 3


def test_a_busy_server_is_asked_twice(server: ScriptedServer, pools: Pools) -> None:
    """A 421 is tried again on a new connection, once."""
    pool = pools()
    server.fail(Stage.GREETING, Fault.BUSY)
    send(pool)
    assert server.connects == 2
    pool.close()

    with pools().connection() as connection:
        server.fail(Stage.GREETING, Fault.BUSY, Fault.BUSY)

        with pytest.raises(ConnectionLost) as caught:
            connection.send(make_envelope())

    assert server.connects == 4
    assert f"{caught.value}" == (
        f"Sending was stopped at the greeting by {pool.server} with a 421. It may allow"
        " fewer connections or messages."
    )


def test_421_for_a_message_is_a_definite_no(
    server: ScriptedServer, pools: Pools
) -> None:
    """A message that is answered with 421 was not taken, and is sent again."""
    server.fail(Stage.DOT, Fault.BUSY)
    send(pools())
    assert len(server.taken) == 1
    assert server.complete.total() == 2


@pytest.mark.parametrize("kept", [True, False])
def test_a_message_whose_fate_is_unknown_is_sent_once(
    server: ScriptedServer, pools: Pools, *, kept: bool
) -> None:
    """What may be delivered is not sent again, and the batch goes on."""
    pool = pools()

    if kept:
        send(pool)

    server.fail(Stage.DOT, Fault.DROP)
    lost = make_envelope()

    with pool.connection() as connection:
        with pytest.raises(DeliveryUnknown):
            connection.send(lost)

        connection.send(make_envelope())

    assert server.complete[lost.message_id] == 1
    assert server.connects == 2


def test_a_refused_message_keeps_the_connection(
    server: ScriptedServer, pools: Pools
) -> None:
    """After a refusal the batch goes on over the same connection."""
    pool = pools()
    server.fail(Stage.RCPT, Fault.PERMANENT)

    with pool.connection() as connection:
        with pytest.raises(DeliveryError, match=r"554 5\.7\.1\.$"):
            connection.send(make_envelope())

        connection.send(make_envelope())

    assert server.connects == 1
    assert len(server.taken) == 1


def test_so_many_messages_per_connection(server: ScriptedServer, pools: Pools) -> None:
    """MAIL_MAX_EMAILS holds within a batch and across batches."""
    pool = pools(max_messages=2)

    with pool.connection() as connection:
        for _ in range(5):
            connection.send(make_envelope())

    assert server.connects == 3
    send(pool)
    assert server.connects == 3
    assert "idle=0" in f"{pool!r}"
    assert server.quits == 3
    assert len(server.taken) == 6


def test_no_connection_can_be_opened(pools: Pools) -> None:
    """A failed connect gives its place back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    pool = pools(size=1, port=port)

    for _ in range(2):
        with pytest.raises(ConnectionLost, match="failed at the TCP connect"):
            send(pool)

    assert "in_use=0 idle=0" in f"{pool!r}"
    assert not pool._own_places().connections


def test_the_local_name_is_looked_up_once(
    server: ScriptedServer, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS is asked for our own name by the first connection, and by no other one."""
    asked = []

    def getfqdn() -> str:
        asked.append(1)
        return "client.example"

    monkeypatch.setattr(socket, "getfqdn", getfqdn)
    pool = pools(keepalive=0)
    send(pool)
    send(pool)
    assert len(asked) == 1
    assert server.commands.count("ehlo client.example") == 2


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_collected_open(server: ScriptedServer) -> None:
    """A pool that is forgotten warns, and closes its sockets and its thread."""
    pool = ConnectionPool(server.settings())
    send(pool)
    closer = pool._own_places().closer
    assert closer is not None

    forgotten = [pool]
    del pool

    with pytest.warns(ResourceWarning, match=r"idle=1 .* was not closed"):
        forgotten.clear()

    closer.join(PATIENCE)
    assert not closer.is_alive()
    server.wait_for(lambda: server.open == 0)
    assert server.quits == 0


def test_collected_closed(server: ScriptedServer) -> None:
    """A pool that was closed, or never used, goes without a word."""
    pool = ConnectionPool(server.settings())
    assert f"{pool!r}" == f"<ConnectionPool 'localhost:{server.port}' size=4 unused>"
    del pool
    pool = ConnectionPool(server.settings())
    send(pool)
    pool.close()
    del pool
    gc.collect()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "A pool of 0 connections can't send anything"),
        ({"keepalive": -1.0}, r"A keepalive of -1\.0 s is below 0"),
    ],
)
def test_wrong_numbers(arguments: dict[str, t.Any], message: str) -> None:
    """Numbers that make no sense are refused with their value."""
    with pytest.raises(ValueError, match=message):
        ConnectionPool(Server(), **arguments)


def test_the_interpreter_exits(server: ScriptedServer) -> None:
    """At exit idle connections get their QUIT, and nobody waits for keepalive."""
    began = time.monotonic()
    shown = run_script(
        """
import sys
from flask_apitask.mail.pool import ConnectionPool
from smtp_servers import Server, make_envelope

pool = ConnectionPool(Server(port=int(sys.argv[1])), keepalive=600)

with pool.connection() as connection:
    connection.send(make_envelope())

print(pool)
""",
        f"{server.port}",
    )
    assert "idle=1" in shown
    assert server.quits == 1
    assert time.monotonic() - began < PATIENCE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("encrypted", [True, False])
def test_a_fork_shares_no_connection(
    tmp_path: pathlib.Path, *, encrypted: bool
) -> None:
    """Parent and child send over connections of their own, whatever either closes."""
    certificates = Certificates(tmp_path)
    context = certificates.context("localhost") if encrypted else None

    with ScriptedServer(tls=context) as server:
        run_script(
            """
import gc, os, sys, warnings
from flask_apitask.mail.pool import ConnectionPool
from smtp_servers import Server, make_envelope

warnings.simplefilter("ignore", DeprecationWarning)
tls = bool(sys.argv[2])
pool = ConnectionPool(
    Server(host="localhost", port=int(sys.argv[1]), use_tls=tls, tls_verify=sys.argv[2])
)

def send():
    with pool.connection() as connection:
        connection.send(make_envelope())

with pool.connection() as first, pool.connection() as second:
    first.send(make_envelope())
    second.send(make_envelope())

with pool.connection() as leased:
    leased.send(make_envelope())
    inherited = list(pool._own_places().connections)
    child = os.fork()

    if not child:
        # In the middle of a batch.
        leased.send(make_envelope())

if not child:
    # After it, in a pool that looks new, while a lock of the parent is held.
    assert "unused" in repr(pool), pool
    send()
    assert "in_use=0 idle=1" in repr(pool), pool
    assert [connection.sock for connection in inherited] == [None, None]
    pool.close()
    sys.exit()

assert os.waitpid(child, 0)[1] == 0
assert "in_use=0 idle=2" in repr(pool), pool
send()
child = os.fork()

if not child:
    # One that does not use what it has inherited.
    sys.exit()

assert os.waitpid(child, 0)[1] == 0
child = os.fork()

if not child:
    # One that forgets it.
    del pool, leased
    gc.collect()
    os._exit(0)

assert os.waitpid(child, 0)[1] == 0
send()
pool.close()
""",
            f"{server.port}",
            certificates.cafile if encrypted else "",
        )
        # Two of the parent, and in the first child one for each of two batches.
        assert server.connects == 4
        assert len(server.taken) == 7
        assert server.quits == 4


def test_a_fork_while_the_lock_is_held(server: ScriptedServer) -> None:
    """A child is not stuck on a lock that a thread of its parent held (race 4)."""
    run_script(
        """
import os, sys, warnings
from flask_apitask.mail.pool import ConnectionPool
from smtp_servers import Server, make_envelope

warnings.simplefilter("ignore", DeprecationWarning)
pool = ConnectionPool(Server(port=int(sys.argv[1]), timeout=5))

with pool.connection() as leased:
    leased.send(make_envelope())

    with pool._own_places().lock:
        child = os.fork()

        if not child:
            leased.end()

            with pool.connection() as own:
                own.send(make_envelope())

            pool.close()
            os._exit(0)

    assert os.waitpid(child, 0)[1] == 0
""",
        f"{server.port}",
    )
    assert len(server.taken) == 2


def test_greenlets(server: ScriptedServer) -> None:
    """Under gevent's monkey patching messages wait for each other, and none is lost."""
    pytest.importorskip("gevent")
    shown = run_script(
        """
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gevent import monkey
    monkey.patch_all()

import sys
import gevent
from flask_apitask.mail.pool import ConnectionPool
from smtp_servers import Server, make_envelope

pool = ConnectionPool(Server(port=int(sys.argv[1])), size=2, keepalive=0.3)

def send():
    with pool.connection() as connection:
        connection.send(make_envelope())

greenlets = [gevent.spawn(send) for _ in range(20)]
gevent.joinall(greenlets, timeout=10, raise_error=True)
assert "in_use=0 idle=2 waiting=0" in repr(pool), pool
gevent.sleep(0.5)
assert "in_use=0 idle=0 waiting=0" in repr(pool), pool
send()
print(pool)
""",
        f"{server.port}",
    )
    assert "idle=1" in shown
    assert len(server.taken) == 20 + 1
    assert server.connects == 3
    server.wait_for(lambda: server.quits == 3)


def test_who_was_to_blame(server: ScriptedServer, pools: Pools) -> None:
    """A lease tells a message that failed from a server that could not be reached."""
    with pools().connection() as connection:
        assert not connection.is_connected
        server.fail(Stage.GREETING, Fault.PERMANENT)

        with pytest.raises(DeliveryError, match="connection was refused by"):
            connection.send(make_envelope())

        assert not connection.is_connected
        server.fail(Stage.MAIL, Fault.PERMANENT)

        with pytest.raises(DeliveryError, match="sender was refused by"):
            connection.send(make_envelope())

        assert connection.is_connected
