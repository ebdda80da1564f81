from __future__ import annotations

import concurrent.futures
import logging
import os
import pathlib
import shutil
import tempfile
import typing as t

import pytest
from conftest import wait_until
from smtp_servers import Certificates
from smtp_servers import make_envelope
from smtp_servers import PATIENCE
from smtp_servers import Postfix

from flask_apitask.exceptions import DeliveryError
from flask_apitask.mail.pool import ConnectionPool

if t.TYPE_CHECKING:
    import collections.abc as cabc

# What Postfix allows at once.
CONNECTIONS = 2


@pytest.fixture(scope="session")
def postfix() -> cabc.Iterator[Postfix]:
    """Run Postfix for the whole session, where it can be had."""
    missing = None

    if not shutil.which("postfix", path="/usr/sbin"):
        missing = "Postfix is not installed (Debian: postfix)"
    elif os.geteuid() != 0:
        missing = "Postfix can be started by root only"

    if missing and os.environ.get("APITASK_REQUIRE_SERVICES") == "1":
        pytest.fail(missing)
    elif missing:
        pytest.skip(missing)

    # Not in pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="postfix-") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o711)

        with Postfix(folder, Certificates(folder), CONNECTIONS) as running:
            yield running


@pytest.fixture
def pool(postfix: Postfix) -> cabc.Iterator[ConnectionPool]:
    """Make a pool for the connections that Postfix allows."""
    made = ConnectionPool(postfix.settings(), size=CONNECTIONS)
    yield made
    made.close_idle()


def test_a_message_arrives(postfix: Postfix, pool: ConnectionPool) -> None:
    """What Postfix delivers is what was sent, dots and all."""
    envelope = make_envelope(body=".\n..two\nlast")

    with pool.connection() as connection:
        connection.send(envelope)

    def found() -> list[bytes]:
        message_id = envelope.message_id.encode()
        return [mail for mail in postfix.mailbox("ada") if message_id in mail]

    wait_until(lambda: bool(found()))
    assert found()[0].endswith(b"\n\n.\n..two\nlast\n")


def test_pipelining(pool: ConnectionPool) -> None:
    """Postfix offers PIPELINING, and it is used."""
    with pool.connection() as connection:
        connection.send(make_envelope())
        assert connection._session is not None
        assert connection._session.has_extn("pipelining")


def test_an_unknown_recipient(postfix: Postfix, pool: ConnectionPool) -> None:
    """Postfix's refusal is reported by its code, and the others get the message."""
    envelope = make_envelope("bob@example.com", "nobody@example.com")

    with pool.connection() as connection:
        with pytest.raises(DeliveryError, match=r"for 1 of 2 recipients: 550 5\.1\.1"):
            connection.send(envelope)

        with pytest.raises(DeliveryError, match="The recipient was refused"):
            connection.send(make_envelope("nobody@example.com"))

        connection.send(make_envelope("ada@example.com"))

    message_id = envelope.message_id.encode()
    wait_until(lambda: message_id in b"".join(postfix.mailbox("bob")))


def test_the_limit_of_connections(postfix: Postfix, pool: ConnectionPool) -> None:
    """Many threads stay below the limit of the server: all messages arrive, once."""
    envelopes = [make_envelope() for _ in range(40)]

    def send(number: int) -> None:
        with pool.connection() as connection:
            connection.send(envelopes[number])

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        for future in [executor.submit(send, number) for number in range(40)]:
            future.result(PATIENCE * 3)

    def arrived() -> list[int]:
        mail = b"".join(postfix.mailbox("ada"))
        return [mail.count(f"{e.message_id}\n".encode()) for e in envelopes]

    wait_until(lambda: all(arrived()))
    assert arrived() == [1] * 40


def test_beyond_the_limit_of_connections(
    postfix: Postfix, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool larger than Postfix allows finds that out, and all messages arrive."""
    caplog.set_level(logging.INFO, "flask_apitask")
    pool = ConnectionPool(postfix.settings(), size=CONNECTIONS + 3)

    def send(_: int) -> None:
        with pool.connection() as connection:
            connection.send(make_envelope())

    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS + 3) as executor:
        list(executor.map(send, range(40)))

    pool.close_idle()
    assert len(caplog.records) <= 1


def test_no_message_without_tls(postfix: Postfix) -> None:
    """Postfix refuses the sender in plain text, and its code is in the error."""
    pool = ConnectionPool(postfix.settings(use_tls=False))

    with (
        pytest.raises(DeliveryError, match=r"encrypted connection .*: 530 5\.7\.0"),
        pool.connection() as connection,
    ):
        connection.send(make_envelope())

    pool.close_idle()


def test_the_certificate_is_verified(postfix: Postfix) -> None:
    """Without its authority the certificate of Postfix is not trusted."""
    pool = ConnectionPool(postfix.settings(tls_verify=True))

    with (
        pytest.raises(DeliveryError, match=r"certificate of .* could not be verified"),
        pool.connection() as connection,
    ):
        connection.send(make_envelope())

    pool.close_idle()
