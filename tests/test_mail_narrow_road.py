from __future__ import annotations

import concurrent.futures
import logging
import threading
import time

import pytest
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import PATIENCE
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask.exceptions import DeliveryError
from flask_apitask.mail import pool as pool_module
from flask_apitask.mail.pool import ConnectionPool

# Seconds of timeout for what is to run into it.
SHORT = 0.3


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


@pytest.mark.parametrize("size", [1, 2])
def test_waiting_is_no_error_while_mail_is_taken(size: int) -> None:
    """Of many messages to a slow server each may wait longer than the timeout."""
    with ScriptedServer(delay=SHORT / 4) as server:
        pool = ConnectionPool(server.settings(timeout=SHORT), size=size)
        send_many(pool, 12 * size, 12 * size)
        pool.close_idle()

    assert len(server.taken) == 12 * size
    assert server.most_open <= size


def test_waiting_is_no_error_while_a_message_is_read() -> None:
    """A large message that takes longer than the timeout keeps others waiting."""
    with ScriptedServer(buffer=65_536) as server:
        pool = ConnectionPool(server.settings(timeout=SHORT), size=1)
        session = pool.acquire()

        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            waiting = executor.submit(send, pool)
            ends_at = time.monotonic() + SHORT * 3

            while time.monotonic() < ends_at:
                # What it is sent is taken, little by little.
                session.heard_at = time.monotonic()
                assert not concurrent.futures.wait([waiting], SHORT / 5).done

            pool.release(session)
            waiting.result(PATIENCE)

        pool.close_idle()


def test_waiting_ends_when_the_server_is_silent() -> None:
    """A server that falls silent costs those who wait one timeout, and no more."""
    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(timeout=SHORT), size=1)
        server.fail(Stage.DOT, *[Fault.SILENCE] * 20)
        began = time.monotonic()

        with pytest.raises(DeliveryError):
            send_many(pool, 6, 6)

        assert time.monotonic() - began < SHORT * 4


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


def test_more_are_tried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is lifted is found out, too, one connection at a time."""
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


def test_an_error_if_no_connection_can_do_it(caplog: pytest.LogCaptureFixture) -> None:
    """A server that lets nobody in is an error for each message, and soon."""
    caplog.set_level(logging.INFO, "flask_apitask")

    with ScriptedServer(allowed=0) as server:
        pool = ConnectionPool(server.settings(), size=4)
        began = time.monotonic()

        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            futures = [executor.submit(send, pool) for _ in range(8)]
            errors = [future.exception(PATIENCE) for future in futures]

        assert time.monotonic() - began < 3

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
    """A child that goes on with a batch of its parent has all of its own places."""
    with ScriptedServer() as server:
        pool = ConnectionPool(server.settings(timeout=SHORT), size=1)

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
        pool = ConnectionPool(server.settings(), size=4)

        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            futures = [executor.submit(send, pool) for _ in range(8)]
            assert all(future.exception(PATIENCE) for future in futures)

        assert pool._limit == 4
