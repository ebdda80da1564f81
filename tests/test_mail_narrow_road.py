from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import typing as t

import pytest
from conftest import wait_until
from flask import Flask
from mail_time import Clock
from mail_time import unhurried
from smtp_servers import Certificates
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import PATIENCE
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask.exceptions import DeliveryError
from flask_apitask.mail import pool as pool_module
from flask_apitask.mail.envelope import SMTPSettings
from flask_apitask.mail.pool import ConnectionPool

# The timeout in seconds, by a clock that the tests move on.
TIMEOUT = 20.0


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a connection for less than a second, if another process may need it."""
    monkeypatch.setattr(pool_module, "_SHORTLY", 0.1)


def send(pool: ConnectionPool) -> None:
    """Send one message."""
    with pool.connection() as connection:
        connection.send(make_envelope())


def send_many(pool: ConnectionPool, number: int, threads: int) -> None:
    """Send messages on threads, which begin together."""
    begin = threading.Barrier(threads)

    def send_some(_: int) -> None:
        begin.wait(PATIENCE)

        for _ in range(number // threads):
            send(pool)

    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        for future in [executor.submit(send_some, n) for n in range(threads)]:
            future.result(PATIENCE * 3)


class Slow(ScriptedServer):
    """A server that takes a quarter of the timeout for each message, by the clock."""

    def __init__(self, clock: Clock, **options: t.Any) -> None:
        super().__init__(**options)
        self._clock = clock

    def next_fault(self, stage: Stage) -> Fault | bytes | None:
        if stage is Stage.DOT:
            self._clock.pass_by(TIMEOUT / 4)

        return super().next_fault(stage)


def look_again(pool: ConnectionPool) -> None:
    """Have the thread that is first in line look at the clock."""
    turn = pool._waiting[0]

    with turn:
        turn.notify()


@pytest.mark.parametrize("size", [1, 2])
def test_waiting_is_no_error_while_mail_is_taken(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Each of many messages to a slow server may wait longer than the timeout."""
    with Slow(Clock(monkeypatch)) as server:
        pool = ConnectionPool(server.settings(timeout=TIMEOUT), size=size)
        send_many(pool, 12 * size, 12 * size)
        pool.close_idle()

    assert len(server.taken) == 12 * size
    assert server.most_open <= size


def test_waiting_is_no_error_while_a_message_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large message that takes longer than the timeout keeps others waiting."""
    clock = Clock(monkeypatch)
    looks = threading.Semaphore(0)
    rounds: list[float] = []

    class Reads(ScriptedServer):
        def _serve(self, peer: t.Any) -> None:
            def receive() -> None:
                type(peer).receive(peer)

                # Whether the other side could send more, since this reads the message.
                is_heard = session.heard_at == clock.monotonic()

                if len(peer.received) > 65_536 and is_heard and len(rounds) < 4:
                    rounds.append(clock.monotonic())
                    clock.pass_by(TIMEOUT * 0.6)
                    look_again(pool)
                    assert looks.acquire(timeout=PATIENCE)

            peer.receive = receive
            super()._serve(peer)

    def look(began: float) -> float:
        try:
            return time_left(began)
        finally:
            looks.release()

    with (
        Reads(buffer=65_536) as server,
        concurrent.futures.ThreadPoolExecutor(1) as executor,
    ):
        pool = ConnectionPool(server.settings(timeout=TIMEOUT), size=1)
        session = pool.acquire()
        session.open()
        session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        time_left = pool._time_left
        monkeypatch.setattr(pool, "_time_left", look)
        waiting = executor.submit(send, pool)
        assert looks.acquire(timeout=PATIENCE)

        try:
            session.deliver(make_envelope(body="x" * 4_000_000))
        finally:
            pool.release(session)

        waiting.result(PATIENCE)
        pool.close_idle()

    assert len(rounds) == 4


def test_waiting_ends_when_the_server_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that falls silent costs waiting threads one timeout, and no more."""
    clock = Clock(monkeypatch)

    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(timeout=TIMEOUT), size=1)
        server.fail(Stage.DOT, Fault.SILENCE)

        with concurrent.futures.ThreadPoolExecutor(6) as executor:
            futures = [executor.submit(send, pool) for _ in range(6)]
            wait_until(lambda: "in_use=1 idle=0 waiting=5" in f"{pool!r}")
            (session,) = pool._in_use
            # It has sent the message, and has begun to wait for the reply.
            wait_until(lambda: session._stage == "end of message")
            clock.pass_by(TIMEOUT)
            look_again(pool)
            wait_until(lambda: sum(future.done() for future in futures) == 5)
            server.hang_up()
            errors = [future.exception(PATIENCE) for future in futures]

    assert all(isinstance(error, DeliveryError) for error in errors)
    assert server.connects == 1


REFUSALS = [
    *((Stage.GREETING, Fault.DROP), (Stage.GREETING, Fault.RESET)),
    *((Stage.EHLO, Fault.DROP), (Stage.AUTH, Fault.DROP), (Stage.MAIL, Fault.DROP)),
    *((stage, Fault.BUSY) for stage in (Stage.GREETING, Stage.EHLO, Stage.AUTH)),
    (Stage.MAIL, Fault.BUSY),
    *(
        (stage, b"%d 4.7.0 too many connections\r\n" % code)
        for code in (432, 450, 451, 452, 454)
        for stage in (Stage.GREETING, Stage.AUTH, Stage.MAIL)
    ),
]


@pytest.mark.parametrize(
    "refusal", REFUSALS, ids=lambda refusal: f"{refusal[0].value}-{refusal[1]}"
)
def test_the_limit_of_a_server_is_found_out(
    refusal: tuple[Stage, Fault | bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Mail goes over the connections that work, and one INFO names the key."""
    caplog.set_level(logging.INFO, "flask_apitask")
    user = ("me@example.com", "secret")

    with ScriptedServer(user=user, allowed=2, refusal=refusal) as server:
        # Long enough for all threads to meet.
        server.delay = 0.005
        pool = ConnectionPool(server.settings(), size=4)
        send_many(pool, 16, 8)
        assert len(server.taken) == 16
        assert server.refused
        refused = server.refused
        send_many(pool, 16, 8)
        assert len(server.taken) == 32
        assert server.refused == refused
        pool.close_idle()

    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "APITASK_MAIL_CONNECTIONS" in record.getMessage()


@pytest.mark.parametrize("how", ["widen", "narrow"])
def test_a_lifted_limit_wakes_a_waiting_thread(how: str) -> None:
    """A thread gets a place that is allowed again before another one is given back."""
    with ScriptedServer() as server, concurrent.futures.ThreadPoolExecutor(1) as other:
        pool = ConnectionPool(server.settings(timeout=15), size=2)
        first, second = pool.acquire(), pool.acquire()
        first.open()
        assert pool.narrow(second, certain=True, scarce=False)
        pool.release(second)
        third = other.submit(pool.acquire)
        wait_until(lambda: "waiting=1" in f"{pool!r}")

        if how == "widen":
            pool.widen()
        else:
            # No other connection works.
            assert not pool.narrow(first, certain=True, scarce=False)

        pool.release(third.result(PATIENCE))
        pool.release(first)
        pool.close_idle()


def test_more_are_tried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lifted limit is noticed too, one connection at a time."""
    with ScriptedServer(allowed=1, delay=0.02) as server:
        pool = ConnectionPool(server.settings(), size=4)
        send_many(pool, 8, 4)
        assert "size=4" in f"{pool!r}"
        assert pool._limit < 4
        server.allowed = None
        monkeypatch.setattr(pool_module, "_TRY_MORE_AFTER", 0.0)
        pool._try_more_at = 0.0
        send_many(pool, 40, 8)
        assert pool._limit == 4
        pool.close_idle()

    assert server.most_open == 4


def test_a_limit_that_stays_is_no_error_when_more_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each further attempt costs a refusal, and no message."""
    monkeypatch.setattr(pool_module, "_TRY_MORE_AFTER", 0.05)

    with ScriptedServer(allowed=2, delay=0.01) as server:
        pool = ConnectionPool(server.settings(), size=4)
        send_many(pool, 80, 8)
        pool.close_idle()

    assert len(server.taken) == 80


def test_an_error_if_no_connection_can_do_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lets nobody in is an error for each message, after a timeout."""
    caplog.set_level(logging.INFO, "flask_apitask")
    clock = Clock(monkeypatch)
    monkeypatch.setattr(clock, "sleep", lambda _: time.sleep(0.01))

    with ScriptedServer(allowed=0) as server:
        pool = ConnectionPool(server.settings(timeout=TIMEOUT), size=4)

        with (
            unhurried(),
            concurrent.futures.ThreadPoolExecutor(4) as executor,
            contextlib.ExitStack() as stack,
        ):
            stack.callback(clock.pass_by, TIMEOUT * 100)
            futures = [executor.submit(send, pool) for _ in range(4)]
            server.wait_for(lambda: server.refused >= 40)
            assert not any(future.done() for future in futures)
            clock.pass_by(TIMEOUT)
            errors = [future.exception(PATIENCE) for future in futures]

    assert not caplog.records
    assert all(isinstance(error, DeliveryError) for error in errors)
    assert {error.smtp_code for error in errors} == {421}  # type: ignore[union-attr]
    assert not server.taken


def test_a_refusal_that_is_no_limit() -> None:
    """A password that is wrong is an error at once, whatever other connections do."""
    user = ("me@example.com", "secret")

    with ScriptedServer(user=user) as server:
        pool = ConnectionPool(server.settings(), size=2)

        with pool.connection() as first:
            first.send(make_envelope())
            server.fail(Stage.AUTH, Fault.PERMANENT)

            with pytest.raises(DeliveryError) as caught:
                send(pool)

        pool.close_idle()

    assert caught.value.smtp_code == 554
    assert caught.value.stage == "AUTH"
    assert pool._limit == 2


def test_a_connection_from_before_a_fork_is_no_limit() -> None:
    """A child that goes on with its parent's batch still has all its places."""
    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(), size=1)

        with pool.connection() as connection:
            connection.send(make_envelope())
            # What a fork does in a child.
            server.hang_up()
            pool.reset()
            server.fail(Stage.MAIL, Fault.TEMPORARY)

            with pytest.raises(DeliveryError, match="451"):
                connection.send(make_envelope())

        send(pool)
        pool.close_idle()

    assert len(server.taken) == 2


def test_a_server_that_is_down_is_no_limit() -> None:
    """Where nobody is let in, all connections are tried again after it."""
    with ScriptedServer(allowed=0) as server:
        pool = ConnectionPool(server.settings(timeout=0.3), size=4)

        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            futures = [executor.submit(send, pool) for _ in range(8)]
            assert all(future.exception(PATIENCE) for future in futures)

        assert pool._limit == 4


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    "refusal", REFUSALS[:2] + REFUSALS[5:9], ids=lambda refusal: f"{refusal}"
)
def test_two_pools_share_one_connection(
    refusal: tuple[Stage, Fault | bytes], pipelining: bool
) -> None:
    """A process that is refused asks again, and the other one frees its connection."""
    user = ("me@example.com", "secret")

    with ScriptedServer(
        user=user, allowed=1, refusal=refusal, pipelining=pipelining
    ) as server:
        settings = server.settings(timeout=6.0)
        pools = [ConnectionPool(settings, size=4) for _ in range(2)]

        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            for sent in [executor.submit(send_many, pool, 10, 5) for pool in pools]:
                sent.result(PATIENCE * 2)

        for pool in pools:
            pool.close_idle()

    assert len(server.taken) == 20


SENDS_TEN = """
import sys
from flask_apitask.mail.pool import ConnectionPool
from smtp_servers import SMTPSettings, make_envelope

settings = SMTPSettings(port=int(sys.argv[1]), timeout=6)
pool = ConnectionPool(settings, size=int(sys.argv[2]))

for _ in range(10):
    with pool.connection() as connection:
        connection.send(make_envelope())

# It goes on, and the connection that it keeps is idle from now on.
sys.stdin.read()
"""


@pytest.mark.parametrize("size", ["1", "4"])
def test_two_processes_share_one_connection(size: str) -> None:
    """The one that is done keeps its connection for less than the other waits."""
    here = pathlib.Path(__file__).parent

    with ScriptedServer(allowed=1) as server, contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", SENDS_TEN, f"{server.port}", size]
        environ = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
        children = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, env=environ)
            )
            for _ in range(2)
        ]
        # The end of their input ends them, however this goes.
        server.wait_for(lambda: len(server.taken) == 20)

        for child in children:
            child.communicate(timeout=PATIENCE)
            assert child.returncode == 0


@pytest.mark.usefixtures("soon")
def test_what_is_kept_is_given_back_once_it_is_scarce() -> None:
    """A process that was refused does not keep a connection that another waits for."""
    with ScriptedServer(allowed=1) as server:
        first, second = (ConnectionPool(server.settings(), size=2) for _ in range(2))

        with first.connection() as connection:
            connection.send(make_envelope())
            # Which finds out that there is not a second one.
            with concurrent.futures.ThreadPoolExecutor(1) as executor:
                waiting = executor.submit(send, first)
                server.wait_for(lambda: server.refused == 1)
                connection.close()
                waiting.result(PATIENCE)

        # Otherwise it would be kept for half of the timeout.
        soon = time.monotonic() + pool_module._SHORTLY
        assert all(due <= soon for due, _ in first._idle)
        send(second)
        second.close_idle()

    assert len(server.taken) == 3


@pytest.mark.usefixtures("soon")
def test_what_is_idle_already_is_given_back_as_well() -> None:
    """Once it is known that connections are scarce, none is kept for long."""
    with ScriptedServer(allowed=2) as server:
        pool = ConnectionPool(server.settings(), size=3)

        with pool.connection() as first, pool.connection() as second:
            first.send(make_envelope())
            second.send(make_envelope())
            first.close()
            first_due = pool._idle[0][0]

            with pool.connection() as third:
                third.send(make_envelope())
                fourth = pool.acquire()

                with pytest.raises(DeliveryError) as caught:
                    fourth.open()

                assert caught.value.smtp_code == 421
                assert pool.narrow(fourth, certain=True, scarce=True)
                pool.release(fourth)

        assert {due for due, _ in pool._idle} != {first_due}
        assert all(due <= time.monotonic() + 1 for due, _ in pool._idle)
        server.wait_for(lambda: server.quits == 2)


def test_a_server_that_takes_mail_is_asked_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of many mails that wait for a turn, each has the timeout after the last one."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(clock, "sleep", lambda _: time.sleep(0.01))

    with Slow(clock, allowed=1) as server:
        # Each of them is refused in its turn.
        server.fail(Stage.GREETING, *[None, Fault.BUSY] * 8)
        settings = server.settings(timeout=TIMEOUT, max_messages=1)
        pool = ConnectionPool(settings, size=2, keepalive=0)
        send_many(pool, 8, 8)

    assert len(server.taken) == 8


HARD = [
    *((Stage.GREETING, fault) for fault in (Fault.SILENCE, Fault.PERMANENT)),
    *((Stage.EHLO, Fault.SILENCE), (Stage.AUTH, Fault.SILENCE)),
    (Stage.GREETING, Fault.GARBAGE),
]


@pytest.mark.parametrize("refusal", HARD, ids=lambda refusal: f"{refusal}")
def test_other_refusals_are_the_limit_where_others_work(
    refusal: tuple[Stage, Fault | bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """A server may also leave a connection too many alone, or say 554."""
    caplog.set_level(logging.INFO, "flask_apitask")
    user = ("me@example.com", "secret")

    with (
        ScriptedServer(user=user, allowed=2, refusal=refusal, delay=0.01) as server,
        unhurried(server),
    ):
        pool = ConnectionPool(server.settings(), size=4)

        # By then, these two have to work.
        with pool.connection() as first, pool.connection() as second:
            first.send(make_envelope())
            second.send(make_envelope())

        send_many(pool, 16, 8)
        pool.close_idle()

    assert len(server.taken) == 18
    assert server.refused
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("refusal", HARD, ids=lambda refusal: f"{refusal}")
def test_another_that_worked_is_closed_by_then(
    refusal: tuple[Stage, Fault | bytes],
) -> None:
    """A server that took a message since is asked again, if no connection is left."""
    user = ("me@example.com", "secret")
    refused, answered = threading.Event(), threading.Event()

    class Waits(ScriptedServer):
        def next_fault(self, stage: Stage) -> Fault | bytes | None:
            if stage is refusal[0] and self.refused and not refused.is_set():
                refused.set()
                assert answered.wait(PATIENCE)
                return refusal[1]

            return super().next_fault(stage)

    with (
        Waits(user=user) as server,
        unhurried(server),
        concurrent.futures.ThreadPoolExecutor(1) as executor,
    ):
        pool = ConnectionPool(server.settings(), size=2, keepalive=0)

        with pool.connection() as first:
            first.send(make_envelope())
            server.refused = 1
            second = executor.submit(send, pool)
            assert refused.wait(PATIENCE)
            first.send(make_envelope())

        assert "in_use=1 idle=0" in f"{pool!r}"
        answered.set()
        second.result(PATIENCE)

    assert len(server.taken) == 3


@pytest.mark.parametrize("refusal", HARD[:2], ids=lambda refusal: f"{refusal}")
def test_other_refusals_are_errors_where_none_works(
    refusal: tuple[Stage, Fault | bytes],
) -> None:
    """A server that is silent to all costs one timeout, and a 554 none."""
    with (
        ScriptedServer(allowed=0, refusal=refusal) as server,
        unhurried(server) as waits,
    ):
        pool = ConnectionPool(server.settings(), size=4)

        with pytest.raises(DeliveryError):
            send(pool)

        assert len(waits) == (refusal[1] is Fault.SILENCE)
        assert server.connects == 1


class Connects(t.NamedTuple):
    """Fails a TCP connect in place of the system."""

    works: int
    error: type[OSError]
    made: list[object]

    def __call__(self, *args: t.Any) -> socket.socket:
        if len(self.made) >= self.works:
            raise self.error

        self.made.append(args)
        return connect(*args)


connect = socket.create_connection


@pytest.mark.parametrize("error", [TimeoutError, ConnectionRefusedError])
def test_a_connect_that_fails_where_others_work(
    error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system on the way may drop or refuse what is too much."""
    with ScriptedServer(delay=0.01) as server:
        pool = ConnectionPool(server.settings(), size=4)
        monkeypatch.setattr(socket, "create_connection", Connects(2, error, []))

        # They have to be there by then.
        with pool.connection() as first, pool.connection() as second:
            first.send(make_envelope())
            second.send(make_envelope())

        send_many(pool, 16, 8)
        pool.close_idle()

    assert len(server.taken) == 18


GREYLISTED = b"450 4.2.0 greylisted, try later\r\n"


def test_a_sender_that_is_refused_is_no_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is refused over a connection that works, too, so it is about the message."""
    caplog.set_level(logging.INFO, "flask_apitask")

    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(), size=4)

        with pool.connection() as first:
            first.send(make_envelope())
            server.fail(Stage.MAIL, GREYLISTED, GREYLISTED)

            with concurrent.futures.ThreadPoolExecutor(1) as executor:
                refused = executor.submit(send, pool)
                server.wait_for(lambda: server.next_fault(Stage.DATA) is None)
                wait_until(lambda: "waiting=1" in f"{pool!r}")
                assert pool._limit == 1
                first.close()
                error = refused.exception(PATIENCE)

        assert isinstance(error, DeliveryError)
        assert (error.stage, error.smtp_code) == ("MAIL", 450)
        assert pool._limit == 4
        assert pool._try_more_at == 0.0
        send(pool)
        pool.close_idle()

    assert not caplog.records
    assert len(server.taken) == 2


def test_senders_that_are_refused_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Many at a time that are all greylisted narrow nothing, and end."""
    caplog.set_level(logging.INFO, "flask_apitask")

    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(), size=4)
        server.fail(Stage.MAIL, *[GREYLISTED] * 100)

        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            futures = [executor.submit(send, pool) for _ in range(8)]
            errors = [future.exception(PATIENCE) for future in futures]

        assert pool._limit == 4
        pool.close_idle()

    assert {getattr(error, "smtp_code", None) for error in errors} == {450}
    assert not caplog.records


def test_a_sender_is_refused_while_others_are_opened(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The place that the server allows may be taken by a session still logging in."""
    caplog.set_level(logging.INFO, "flask_apitask")

    with (
        ScriptedServer() as server,
        concurrent.futures.ThreadPoolExecutor(1) as executor,
    ):
        pool = ConnectionPool(server.settings(), size=4)
        server.fail(Stage.MAIL, b"452 4.3.2 too many\r\n")
        first = pool.acquire()
        second = executor.submit(send, pool)
        wait_until(lambda: second.done() or "waiting=1" in f"{pool!r}")
        first.open()
        pool.release(first)
        second.result(PATIENCE)
        pool.close_idle()

    assert len(server.taken) == 1
    assert [record.levelno for record in caplog.records] == [logging.INFO]


class Exchange(ScriptedServer):
    """Takes so many messages at a time, as Microsoft 365 does: three by default."""

    def __init__(self, at_once: int, **options: t.Any) -> None:
        super().__init__(**options)
        self._places = threading.Semaphore(at_once)
        self.full = 0

    def next_fault(self, stage: Stage) -> Fault | bytes | None:
        if stage is not Stage.DOT:
            return super().next_fault(stage)

        if not self._places.acquire(blocking=False):
            self.full += 1
            return b"432 4.3.2 Concurrent connections limit exceeded.\r\n"

        # As long as it takes a message.
        self.stopped.wait(0.03)
        self._places.release()
        return None


def test_messages_that_are_too_many_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A limit that is told at the end of a message is one, and nothing is lost."""
    caplog.set_level(logging.INFO, "flask_apitask")

    exchange = Exchange(2)

    with exchange as server:
        pool = ConnectionPool(server.settings(), size=4)
        send_many(pool, 16, 8)
        full = exchange.full
        send_many(pool, 16, 8)
        pool.close_idle()

    assert len(server.taken) == 32
    assert 0 < full == exchange.full
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "432 at end of message" in record.getMessage()


def test_messages_of_others_are_too_many_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If other processes use up the limit, it is tried again on the same connection."""
    limited = b"432 4.3.2 Concurrent connections limit exceeded.\r\n"
    clock = Clock(monkeypatch)

    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(), size=4)
        server.fail(Stage.DOT, None, limited, limited, None, limited, limited)
        send(pool)
        send(pool)
        assert server.connects == 1
        assert len(server.taken) == 2
        server.fail(Stage.DOT, *[limited] * 40)
        clock.slept.clear()

        with pytest.raises(DeliveryError, match="APITASK_MAIL_CONNECTIONS") as caught:
            send(pool)

        assert sum(clock.slept) == pytest.approx(pool.settings.timeout)
        assert caught.value.smtp_code == 432
        pool.close_idle()


class Exim(ScriptedServer):
    """Refuses in plain text, and lets in once that was tried again."""

    def _serve(self, session: t.Any) -> None:
        if session.unwanted:
            session.encrypt = functools.partial(session.play, Fault.BUSY)
        else:
            self.wait_for(lambda: self.connects > 2)

        super()._serve(session)


def test_a_limit_that_is_told_in_place_of_tls(tmp_path: pathlib.Path) -> None:
    """Another connection may be in the middle of its handshake, and not work yet."""
    certificates = Certificates(tmp_path)
    tls = certificates.context("localhost")

    with Exim(tls=tls, implicit=True, allowed=1) as server:
        settings = server.settings(tls_verify=certificates.cafile)
        pool = ConnectionPool(settings, size=2)
        send_many(pool, 2, 2)
        pool.close_idle()

    assert len(server.taken) == 2


def test_the_limit_is_told_once_for_an_app(caplog: pytest.LogCaptureFixture) -> None:
    """It is not logged again after a pause, with a new pool."""
    caplog.set_level(logging.INFO, "flask_apitask")
    app, other = Flask("app"), Flask("other")

    for owner in (app, app, other):
        ConnectionPool(SMTPSettings(port=1), owner=owner).tell(421, "greeting")

    assert len(caplog.records) == 2
    ConnectionPool(SMTPSettings(port=2), owner=other).tell(421, "greeting")
    assert len(caplog.records) == 3
