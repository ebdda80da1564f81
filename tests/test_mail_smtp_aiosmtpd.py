from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import typing as t

import pytest
from aiosmtpd.smtp import AuthResult
from aiosmtpd.smtp import LoginPassword
from aiosmtpd.smtp import SMTP
from smtp_servers import Certificates
from smtp_servers import make_envelope
from smtp_servers import PATIENCE

from flask_apitask.exceptions import DeliveryError
from flask_apitask.mail.envelope import SMTPSettings
from flask_apitask.mail.pool import ConnectionPool

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from aiosmtpd.smtp import Envelope
    from aiosmtpd.smtp import Session

USER = ("me@example.com", "secret")


class Taken:
    """A handler that keeps what it is given."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []

    async def handle_DATA(
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        assert session.ssl is not None
        assert session.authenticated
        self.contents.append(t.cast("bytes", envelope.content))
        return "250 OK"


def authenticate(
    server: SMTP, session: Session, envelope: Envelope, mechanism: str, login: t.Any
) -> AuthResult:
    """Let the one user in."""
    assert isinstance(login, LoginPassword)
    right = (login.login.decode(), login.password.decode()) == USER
    return AuthResult(success=right, handled=False)


@contextlib.contextmanager
def serve(make_protocol: cabc.Callable[[], SMTP]) -> cabc.Iterator[int]:
    """Run aiosmtpd on a thread of its own; give its port."""
    serving = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        server = await loop.create_server(make_protocol, sock=listener)
        stoppers.append(lambda: loop.call_soon_threadsafe(ended.set))
        serving.set()

        async with server:
            await ended.wait()

    stoppers: list[cabc.Callable[[], object]] = []
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert serving.wait(PATIENCE)

    try:
        yield listener.getsockname()[1]
    finally:
        stoppers[0]()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("password", [USER[1], "wrong"])
def test_starttls_and_auth(tmp_path: pathlib.Path, password: str) -> None:
    """aiosmtpd gets the messages of a batch over TLS, from who may log in."""
    certificates = Certificates(tmp_path)
    handler = Taken()
    context = certificates.context("localhost")

    def make_protocol() -> SMTP:
        return SMTP(
            handler,
            hostname="localhost",
            tls_context=context,
            require_starttls=True,
            auth_required=True,
            authenticator=authenticate,
        )

    batch = [make_envelope(body=f".{number}") for number in range(3)]

    with serve(make_protocol) as port:
        pool = ConnectionPool(
            SMTPSettings(
                host="localhost",
                port=port,
                use_tls=True,
                tls_verify=certificates.cafile,
                username=USER[0],
                password=password,
            )
        )

        with pool.connection() as connection:
            if password == "wrong":
                with pytest.raises(DeliveryError, match=r"was refused by .*: 535 5\.7"):
                    connection.send(batch[0])
            else:
                for envelope in batch:
                    connection.send(envelope)

        pool.close_idle()

    expected = [envelope.content.replace(b"\n", b"\r\n") for envelope in batch]
    assert handler.contents == ([] if password == "wrong" else expected)
