from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import socket
import threading
import time
import typing as t

import pytest
from conftest import wait_until
from mail_time import Clock
from mail_time import unhurried
from smtp_servers import Certificates
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import PATIENCE
from smtp_servers import run_script
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask.exceptions import DeliveryError
from flask_apitask.exceptions import DeliveryUnknown
from flask_apitask.mail import connection as connection_module
from flask_apitask.mail.pool import ConnectionPool
from flask_apitask.mail.reaper import reaper
from flask_apitask.mail.smtp import SMTPSession
from flask_apitask.mail.stream import ConnectionLost

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

# Seconds until something that happens by itself.
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
        pool.close_idle()


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


def wait_for_line(pool: ConnectionPool, length: int) -> None:
    """Wait until so many threads wait for a connection."""
    wait_until(lambda: f"waiting={length}" in f"{pool!r}")


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
    server.wait_for(lambda: server.quits == 2)


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

    used = pool.acquire()
    pool.release(used)

    for _ in range(3):
        send(pool)
        assert pool.acquire() is used
        pool.release(used)

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


def test_no_time_for_goodbye(
    server: ScriptedServer, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the time for it is over, nobody waits for the reply to a QUIT."""
    monkeypatch.setattr(connection_module, "_QUIT_TIMEOUT", -1.0)
    pool = pools()
    server.fail(Stage.QUIT, Fault.SILENCE)
    send(pool)

    with unhurried(server) as waits:
        pool.close_idle()

    assert len(waits) == 1
    assert waits[0] < 0
    server.wait_for(lambda: server.open == 0)


def test_the_size_is_the_limit_without_keepalive(
    server: ScriptedServer, pools: Pools
) -> None:
    """Without keepalive, a connection goes to a waiting thread, or is closed."""
    pool = pools(size=2, keepalive=0)

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        for future in [executor.submit(send, pool) for _ in range(40)]:
            future.result(PATIENCE)

    assert len(server.taken) == 40
    # Six of eight threads always wait, until the last sends.
    assert 2 <= server.connects < 20
    server.wait_for(lambda: server.open == 0)
    server.wait_for(lambda: server.quits == server.connects)


def test_waiters_are_served_in_order(pools: Pools) -> None:
    """Threads get the connection in the order in which they came."""
    pool = pools(size=1)
    first = Holder(pool)
    assert first.has_it.wait(PATIENCE)
    order: list[int] = []

    def wait_in_line(number: int) -> None:
        session = pool.acquire()
        order.append(number)
        pool.release(session)

    threads = []

    for number in range(5):
        thread = threading.Thread(target=wait_in_line, args=[number])
        threads.append(thread)
        thread.start()
        wait_for_line(pool, number + 1)

    assert "size=1 in_use=1 idle=0 waiting=5" in f"{pool!r}"
    first.end()

    for thread in threads:
        thread.join(PATIENCE)

    assert order == [0, 1, 2, 3, 4]


def test_a_place_without_a_connection(server: ScriptedServer, pools: Pools) -> None:
    """A thread that waits gets the place of a session that was never opened."""
    pool = pools(size=1)
    session = pool.acquire()

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        sent = executor.submit(send, pool)
        wait_for_line(pool, 1)
        pool.release(session)
        sent.result(PATIENCE)

    assert server.connects == 1
    assert len(server.taken) == 1


def test_waiting_has_an_end(server: ScriptedServer, pools: Pools) -> None:
    """A wait past the timeout says how many are in use, and leaves the line."""
    pool = pools(size=1)
    holder = Holder(pool)
    assert holder.has_it.wait(PATIENCE)
    pool.settings = server.settings(timeout=SHORT)

    with pytest.raises(DeliveryError) as caught:
        send(pool)

    assert f"{caught.value}" == (
        f"No connection to {pool.settings} was free, and the server was silent for"
        " 0.3 s (APITASK_MAIL_TIMEOUT): all 1 are in use, and 0 more tasks are waiting."
        " Allow more connections (APITASK_MAIL_CONNECTIONS), or send less mail at once."
    )
    assert "waiting=0" in f"{pool!r}"
    holder.end()
    send(pool)
    assert server.connects == 1


def test_a_free_place_is_not_waited_for_in_vain(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the first in line takes its place, those behind don't give up."""
    pool = pools(size=1)
    holder = Holder(pool)
    assert holder.has_it.wait(PATIENCE)
    goes_on = threading.Event()
    wait, now = threading.Condition.wait, time.monotonic

    def wait_long(self: threading.Condition, timeout: float | None = None) -> bool:
        if self not in pool._waiting or self is not pool._waiting[0]:
            return wait(self, timeout)

        self.release()
        assert goes_on.wait(PATIENCE)
        self.acquire()
        return True

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Condition, "wait", wait_long)
            first = executor.submit(send, pool)
            wait_for_line(pool, 1)
            second = executor.submit(send, pool)
            wait_for_line(pool, 2)

        # The time that passes is not long enough to close the connection.
        monkeypatch.setattr(reaper, "watch", lambda *_: None)
        holder.end()
        assert "in_use=0 idle=1 waiting=2" in f"{pool!r}"
        monkeypatch.setattr(time, "monotonic", lambda: now() + PATIENCE * 2)

        with reaper.lock:
            pool._waiting[1].notify()

        # It would give up here.
        assert not concurrent.futures.wait([second], SHORT).done
        goes_on.set()
        first.result(PATIENCE)
        second.result(PATIENCE)


class Interrupted(BaseException):
    """Stands for what a signal, or killing a greenlet, raises at any point."""


def test_an_interrupted_wait(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that is free as the wait for it is interrupted is not lost (race 2)."""
    pool = pools(size=1)
    holder = Holder(pool)
    assert holder.has_it.wait(PATIENCE)
    wait = threading.Condition.wait

    def interrupt(self: threading.Condition, timeout: float | None = None) -> bool:
        if self not in pool._waiting:
            return wait(self, timeout)

        self.release()
        holder.end()
        self.acquire()
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "wait", interrupt)

        with pytest.raises(Interrupted):
            send(pool)

    assert "in_use=0 idle=1 waiting=0" in f"{pool!r}"


@pytest.mark.parametrize("joined", [True, False])
def test_an_interrupt_in_line(pools: Pools, joined: bool) -> None:
    """Whoever is interrupted just as it joins the line doesn't stay there."""

    class Line(collections.deque[threading.Condition]):
        def append(self, turn: threading.Condition) -> None:
            if joined:
                super().append(turn)

            raise Interrupted

    pool = pools()
    pool._waiting = Line()

    with pytest.raises(Interrupted):
        pool.acquire()

    assert "in_use=0 idle=0 waiting=0" in f"{pool!r}"


def test_an_interrupt_once_there_is_a_place(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place is not lost with a thread that is interrupted as it leaves with it."""

    def interrupt() -> None:
        assert "in_use=1" in f"{pool!r}"
        raise Interrupted

    pool = pools(size=1)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_wake_next", interrupt)

        # Not with raises(), which keeps what the traceback refers to.
        with contextlib.suppress(Interrupted):
            pool.acquire()

    assert "in_use=0" in f"{pool!r}"


def test_a_lost_wake_up(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an interrupt comes before the next is woken, it looks once per timeout."""
    Clock(monkeypatch)
    pool = pools(size=2, timeout=SHORT)
    sessions = [pool.acquire(), pool.acquire()]
    wait = threading.Condition.wait
    behind: list[float | None] = []

    def note(self: threading.Condition, timeout: float | None = None) -> bool:
        if self in pool._waiting and self is not pool._waiting[0]:
            behind.append(timeout)

        return wait(self, timeout)

    with (
        concurrent.futures.ThreadPoolExecutor(2) as executor,
        contextlib.ExitStack() as stack,
    ):
        # However this goes, nobody waits for ever.
        for session in sessions:
            stack.callback(pool.release, session)

        patch = stack.enter_context(monkeypatch.context())
        patch.setattr(threading.Condition, "wait", note)
        patch.setattr(pool, "_wake_next", lambda: None)
        first = executor.submit(pool.acquire)
        wait_for_line(pool, 1)
        second = executor.submit(pool.acquire)
        wait_until(lambda: len(behind) == 2)

        for session in sessions:
            pool.release(session)

        for waiting in (first, second):
            pool.release(waiting.result(PATIENCE))

    assert set(behind) == {SHORT}


def test_an_interrupted_release(
    pools: Pools, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place is not lost with what interrupts the closing of its connection."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    pool = pools(keepalive=0)

    session = pool.acquire()
    session.open()
    monkeypatch.setattr(SMTPSession, "docmd", interrupt)

    with pytest.raises(Interrupted):
        pool.release(session)

    monkeypatch.undo()
    assert "in_use=0 idle=0" in f"{pool!r}"
    server.wait_for(lambda: server.open == 0)


def test_idle_connections_are_closed(server: ScriptedServer, pools: Pools) -> None:
    """After keepalive the server gets a QUIT, though no other message is sent."""
    pool = pools()
    holders = [Holder(pool) for _ in range(3)]

    for holder in holders:
        assert holder.has_it.wait(PATIENCE)

    for holder in holders:
        holder.end()

    assert "idle=3" in f"{pool!r}"
    # They are due at the same time as the one that is used now.
    pool.keepalive = SHORT
    began = time.monotonic()
    send(pool)
    server.wait_for(lambda: server.quits == 3 and server.open == 0)
    assert time.monotonic() - began >= SHORT
    wait_until(lambda: reaper.thread is None)
    assert "in_use=0 idle=0" in f"{pool!r}"
    send(pool)
    assert server.connects == 4


def test_use_puts_the_end_off(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalive counts from the last use of a connection, by the clock."""
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pool = pools(keepalive=30, timeout=60)
    send(pool)
    assert [until for until, _ in pool._idle] == [1_030.0]
    now += 20
    send(pool)
    assert [until for until, _ in pool._idle] == [1_050.0]


def test_the_reaper_ends_as_a_connection_comes_back(
    server: ScriptedServer, pools: Pools
) -> None:
    """A connection that comes back when the reaper has ended gets another (race 1)."""
    pool = pools(keepalive=SHORT / 3)

    for number in range(1, 4):
        send(pool)
        server.wait_for(lambda number=number: server.quits == number)  # type: ignore[misc]

    assert server.connects == 3


def test_one_thread_for_many_messages(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a connection is used again and again, no other thread is started."""
    pool = pools()
    looked = threading.Event()
    close_idle = ConnectionPool.close_idle

    def look(self: ConnectionPool, *args: float) -> None:
        looked.set()
        close_idle(self, *args)

    monkeypatch.setattr(ConnectionPool, "close_idle", look)
    send(pool)
    session = pool.acquire()
    thread = reaper.thread
    # If it looked now, it would find nothing to close, and end.
    assert not looked.wait(SHORT)
    pool.release(session)
    assert reaper.thread is thread


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


def test_a_shorter_keepalive_comes_first(server: ScriptedServer, pools: Pools) -> None:
    """The reaper wakes in time for a connection that is due before all others."""
    send(pools())
    thread = reaper.thread
    assert thread is not None
    send(pools(keepalive=SHORT / 3))
    assert reaper.thread is thread
    server.wait_for(lambda: server.quits == 1 and server.open == 1)


def test_close_idle(server: ScriptedServer, pools: Pools) -> None:
    """Idle connections are closed, and those in use are not."""
    pool = pools()
    holder = Holder(pool)
    assert holder.has_it.wait(PATIENCE)
    send(pool)
    assert "in_use=1 idle=1" in f"{pool!r}"
    pool.close_idle()
    server.wait_for(lambda: server.quits == 1)
    assert "in_use=1 idle=0" in f"{pool!r}"
    holder.end()
    assert "in_use=0 idle=1" in f"{pool!r}"


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
    """A failure on a kept and then on a new connection is reported."""
    pool = pools()
    send(pool)
    server.fail(Stage.DATA, Fault.DROP, Fault.DROP)

    with pool.connection() as connection:
        with pytest.raises(ConnectionLost, match="failed at DATA") as caught:
            connection.send(make_envelope())

        connection.send(make_envelope())

    assert caught.value.__cause__ is None
    assert len(server.taken) == 2
    assert server.connects == 3


def test_a_busy_server_is_asked_again(
    server: ScriptedServer, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 421 is tried again on new connections, until the timeout is over."""
    clock = Clock(monkeypatch)
    pool = pools(timeout=5.0)
    server.fail(Stage.GREETING, Fault.BUSY, Fault.BUSY)
    send(pool)
    assert server.connects == 3
    pool.close_idle()
    clock.slept.clear()

    with pool.connection() as connection:
        server.fail(Stage.GREETING, *[Fault.BUSY] * 20)

        with pytest.raises(ConnectionLost) as caught:
            connection.send(make_envelope())

    # The last attempt comes when the timeout is over.
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1, 1, 1, 0.5])
    assert server.connects == 3 + 9
    assert f"{caught.value}" == (
        f"The connection to {pool.settings} failed at the greeting: the server ended it"
        " with '421 4.7.0 too many connections'. It may allow fewer connections"
        " (APITASK_MAIL_CONNECTIONS) or messages (MAIL_MAX_EMAILS)."
        " A 4xx reply is temporary: the server may accept the message later."
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
    """A message that may be delivered is not sent again, and the batch goes on."""
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
        with pytest.raises(DeliveryError, match=r": 554 5\.7\.1 <address> not ever\.$"):
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
    server.wait_for(lambda: server.quits == 3)
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


def test_the_local_name_is_looked_up_once(
    server: ScriptedServer, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS is asked for our own name by the first connection, and by no other one."""
    asked = []

    def getfqdn() -> str:
        asked.append(1)
        return "client.example"

    monkeypatch.setattr(socket, "getfqdn", getfqdn)
    connection_module._local_hostname.cache_clear()
    pool = pools(keepalive=0)
    send(pool)
    send(pool)
    connection_module._local_hostname.cache_clear()
    assert len(asked) == 1
    assert server.commands.count("ehlo client.example") == 2


def test_a_host_name_outside_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer may have a name that can't be said to a mail server."""
    monkeypatch.setattr(socket, "getfqdn", lambda: "jörgs-rechner.example")
    connection_module._local_hostname.cache_clear()

    with ScriptedServer() as server:
        send(ConnectionPool(server.settings(), keepalive=0))

    connection_module._local_hostname.cache_clear()
    assert server.commands[0] == "ehlo [127.0.0.1]"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_interpreter_exits(server: ScriptedServer) -> None:
    """At exit idle connections get their QUIT, and nobody waits for keepalive."""
    shown = run_script(
        """
import sys
from flask_apitask.mail.pool import ConnectionPool
from smtp_servers import SMTPSettings, make_envelope

settings = SMTPSettings(port=int(sys.argv[1]), timeout=1200)
pool = ConnectionPool(settings, keepalive=600)

with pool.connection() as connection:
    connection.send(make_envelope())

print(pool)
""",
        f"{server.port}",
    )
    assert "idle=1" in shown
    server.wait_for(lambda: server.quits == 1)


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
from smtp_servers import SMTPSettings, make_envelope

warnings.simplefilter("ignore", DeprecationWarning)
tls = bool(sys.argv[2])
pool = ConnectionPool(
    SMTPSettings("localhost", int(sys.argv[1]), use_tls=tls, tls_verify=sys.argv[2])
)

def send():
    with pool.connection() as connection:
        connection.send(make_envelope())

with pool.connection() as first, pool.connection() as second:
    first.send(make_envelope())
    second.send(make_envelope())

with pool.connection() as leased:
    leased.send(make_envelope())
    inherited = [*pool._in_use, *(session for _, session in pool._idle)]
    child = os.fork()

    if not child:
        # In the middle of a batch.
        leased.send(make_envelope())

if not child:
    # After it, in a pool that looks new, while a lock of the parent is held.
    assert "in_use=0 idle=0" in repr(pool), pool
    assert [session.sock for session in inherited] == [None, None]
    send()
    assert "in_use=0 idle=1" in repr(pool), pool
    pool.close_idle()
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
pool.close_idle()
""",
            f"{server.port}",
            certificates.cafile if encrypted else "",
        )
        # Two of the parent, and in the first child one for each of two batches.
        assert server.connects == 4
        assert len(server.taken) == 7
        server.wait_for(lambda: server.quits == 4)


def test_a_fork_while_the_lock_is_held(server: ScriptedServer) -> None:
    """A child is not stuck on a lock that a thread of its parent held (race 3)."""
    run_script(
        """
import os, sys, warnings
from flask_apitask.mail.pool import ConnectionPool
from flask_apitask.mail.reaper import reaper
from smtp_servers import SMTPSettings, make_envelope

warnings.simplefilter("ignore", DeprecationWarning)
pool = ConnectionPool(SMTPSettings(port=int(sys.argv[1]), timeout=5))

with pool.connection() as leased:
    leased.send(make_envelope())

    with reaper.lock:
        child = os.fork()

        if not child:
            leased.close()

            with pool.connection() as own:
                own.send(make_envelope())

            pool.close_idle()
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
from smtp_servers import SMTPSettings, make_envelope

settings = SMTPSettings(port=int(sys.argv[1]), timeout=60)
pool = ConnectionPool(settings, size=2, keepalive=30)

def send():
    with pool.connection() as connection:
        connection.send(make_envelope())

greenlets = [gevent.spawn(send) for _ in range(20)]
gevent.joinall(greenlets, timeout=10, raise_error=True)
assert "in_use=0 idle=2 waiting=0" in repr(pool), pool
pool.keepalive = 0.3
send()

with gevent.Timeout(10):
    while "in_use=0 idle=0 waiting=0" not in repr(pool):
        gevent.sleep(0.01)

pool.keepalive = 30
send()
print(pool)
""",
        f"{server.port}",
    )
    assert "idle=1" in shown
    assert len(server.taken) == 20 + 2
    assert server.connects == 3
    server.wait_for(lambda: server.quits == 3)
