from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import socket
import ssl
import threading
import time
import traceback
import typing as t
from unittest import mock

import pytest
from mail_time import Clock
from mail_time import unhurried
from smtp_servers import Certificates
from smtp_servers import Ended
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import PATIENCE
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask.exceptions import DeliveryError
from flask_apitask.exceptions import DeliveryUnknown
from flask_apitask.mail import connection as connection_module
from flask_apitask.mail.connection import end_all
from flask_apitask.mail.envelope import Envelope
from flask_apitask.mail.envelope import SMTPSettings
from flask_apitask.mail.smtp import SMTPSession
from flask_apitask.mail.stream import ConnectionLost

if t.TYPE_CHECKING:
    import collections.abc as cabc

USER = ("me@example.com", "secret")
# Timeouts in seconds: one that is to run out, and one that is not.
SHORT, TIMEOUT = 0.3, 20.0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make an authority for the tests of this file."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(autouse=True)
def local_hostname(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a name that DNS is not asked for."""
    monkeypatch.setattr(connection_module, "_local_hostname", lambda: "client.example")


@contextlib.contextmanager
def connect(settings: SMTPSettings) -> cabc.Iterator[SMTPSession]:
    """Have a session for the length of a block."""
    session = SMTPSession(settings)

    try:
        session.open()
        yield session
    finally:
        end_all([session])


def fail_to_send(
    server: SMTPSettings, envelope: Envelope | None = None
) -> DeliveryError:
    """Send a message, and return the error that it ends with."""
    with pytest.raises(DeliveryError) as caught, connect(server) as connection:
        connection.deliver(envelope or make_envelope())

    shown = "".join(traceback.format_exception(caught.value))
    assert "ada@example.com" not in shown
    assert USER[0] not in shown
    assert USER[1] not in shown
    return caught.value


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (b"one\ntwo\n", b"one\r\ntwo\r\n"),
        (b"one\rtwo", b"one\r\ntwo\r\n"),
        (b"one\r\ntwo\r\n", b"one\r\ntwo\r\n"),
        (b"one\n\ntwo", b"one\r\n\r\ntwo\r\n"),
        (b"one\n.\ntwo\n..three\n.", b"one\r\n.\r\ntwo\r\n..three\r\n.\r\n"),
        (b"one\n.\rQUIT\r.\n", b"one\r\n.\r\nQUIT\r\n.\r\n"),
        (b"", b"\r\n"),
    ],
)
def test_content_arrives_whole(given: bytes, taken: bytes) -> None:
    """Line ends become CRLF, and no line of a message is taken for its end."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        connection.deliver(make_envelope(content=b"Message-ID: x\n" + given))

    assert [message.content for message in server.taken] == [
        b"Message-ID: x\r\n" + taken.removeprefix(b"\r\n")
        if not given
        else b"Message-ID: x\r\n" + taken
    ]


@pytest.mark.parametrize(("pipelining", "flights"), [(True, 2), (False, 4)])
def test_round_trips(*, pipelining: bool, flights: int) -> None:
    """A message costs two round trips with PIPELINING and four without."""
    with (
        ScriptedServer(pipelining=pipelining) as server,
        connect(server.settings()) as connection,
    ):
        connection.deliver(make_envelope())
        before = server.flights
        connection.deliver(make_envelope())
        assert server.flights - before == flights

    assert len(server.taken) == 2


def test_options_as_smtplib_sends_them() -> None:
    """SIZE comes first where it is offered, and then what the envelope says."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        connection.deliver(
            make_envelope(
                mail_options=("BODY=8BITMIME",), rcpt_options=("NOTIFY=NEVER",)
            )
        )

    size = len(server.taken[0].content)
    assert f"MAIL FROM:<root@example.com> SIZE={size} BODY=8BITMIME" in server.commands
    assert "RCPT TO:<ada@example.com> NOTIFY=NEVER" in server.commands


def test_helo_where_ehlo_is_unknown() -> None:
    """A server without extensions gets the message too, without options."""
    with ScriptedServer() as server:
        server.fail(Stage.EHLO, Fault.PERMANENT)

        with connect(server.settings()) as connection:
            connection.deliver(
                make_envelope(
                    mail_options=("BODY=8BITMIME",), rcpt_options=("NOTIFY=NEVER",)
                )
            )

    assert server.commands[:4] == [
        "ehlo client.example",
        "helo client.example",
        "MAIL FROM:<root@example.com>",
        "RCPT TO:<ada@example.com>",
    ]


def test_neither_ehlo_nor_helo() -> None:
    """A server that lets nobody say hello is named, with its code."""

    with ScriptedServer() as server:
        server.fail(Stage.EHLO, Fault.PERMANENT, Fault.TEMPORARY)
        error = fail_to_send(server.settings())

    assert f"{error}" == (
        f"EHLO was refused by {server.settings()}: 451 4.3.0 <address> not now. A 4xx"
        " reply is temporary: the server may accept the message later."
    )


@pytest.mark.parametrize("end", [Fault.DROP, Fault.BUSY])
def test_a_refused_ehlo_stands_when_the_server_hangs_up(end: Fault) -> None:
    """What the server says of its reasons is not lost with the HELO that follows."""
    with ScriptedServer() as server:
        server.fail(Stage.EHLO, b"554 5.7.1 blocked\r\n", end)
        error = fail_to_send(server.settings())

    assert not isinstance(error, ConnectionLost)
    assert f"{error}" == f"EHLO was refused by {server.settings()}: 554 5.7.1 blocked."


def test_smtputf8_is_declared_for_addresses_outside_of_ascii() -> None:
    """An address outside of ASCII goes out in UTF-8, where the server offers it."""
    with (
        ScriptedServer(extensions=("SMTPUTF8", "8BITMIME")) as server,
        connect(server.settings()) as connection,
    ):
        connection.deliver(make_envelope("jörg@example.com"))
        options = ("BODY=8BITMIME", "SMTPUTF8")
        connection.deliver(make_envelope("jörg@example.com", mail_options=options))
        connection.deliver(make_envelope())

    assert [line for line in server.commands if line.startswith("MAIL")] == [
        "MAIL FROM:<root@example.com> SMTPUTF8 BODY=8BITMIME",
        "MAIL FROM:<root@example.com> BODY=8BITMIME SMTPUTF8",
        "MAIL FROM:<root@example.com>",
    ]
    assert server.taken[0].recipients == ("jörg@example.com",)


def test_no_smtputf8() -> None:
    """An address that the server can't take is an error, and the connection is kept."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        with pytest.raises(DeliveryError, match="needs SMTPUTF8"):
            connection.deliver(make_envelope("jörg@example.com"))

        connection.deliver(make_envelope())

    assert len(server.taken) == 1


def test_pipelining_is_what_the_server_says_after_tls(
    certificates: Certificates,
) -> None:
    """An extension that was offered in plain text only is not used."""
    with ScriptedServer(tls=certificates.context("localhost")) as server:
        server.fail(Stage.EHLO, None, b"250 only this\r\n")

        with connect(server.settings(tls_verify=certificates.cafile)) as connection:
            before = server.flights
            connection.deliver(make_envelope())
            assert server.flights - before == 4


@pytest.mark.parametrize("pipelining", [True, False])
def test_thousands_of_recipients(*, pipelining: bool) -> None:
    """Neither side waits for the other one to read (RFC 2920, section 3.1)."""
    recipients = [f"{number}@example.com" for number in range(3_000)]

    with ScriptedServer(pipelining=pipelining, buffer=32_768) as server:
        server.fail(Stage.RCPT, *[b"250-%s\r\n250 ok\r\n" % (b"x" * 1_000)] * 3_000)

        with connect(server.settings()) as connection:
            assert connection.sock is not None
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
            before = server.flights
            connection.deliver(make_envelope(*recipients))
            assert (server.flights - before < 1_000) is pipelining

    assert server.taken[0].recipients == tuple(recipients)


def test_some_recipients_are_refused() -> None:
    """The others get the message, and one error counts who does not, without names."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.RCPT, None, Fault.PERMANENT, Fault.TEMPORARY, Fault.PERMANENT)
        server.fail(Stage.RCPT, b"551 elsewhere\r\n")
        recipients = [f"{name}@example.com" for name in ("eve", *"abcd")]

        with pytest.raises(DeliveryError) as caught:
            connection.deliver(make_envelope(*recipients))

    assert f"{caught.value}" == (
        f"The message was taken by {server.settings()}, but not for 4 of 5 recipients:"
        " 554 5.7.1 <address> not ever (2 times), 451 4.3.0 <address> not now,"
        " 551 elsewhere. A 4xx reply is temporary: the server may accept the message"
        " later."
    )
    assert {message.recipients for message in server.taken} == {("eve@example.com",)}


@pytest.mark.parametrize("pipelining", [True, False])
def test_everybody_is_refused(*, pipelining: bool) -> None:
    """Nothing is sent to nobody, and the connection is good for the next message."""
    with (
        ScriptedServer(pipelining=pipelining) as server,
        connect(server.settings()) as connection,
    ):
        server.fail(Stage.RCPT, Fault.PERMANENT, Fault.PERMANENT)

        with pytest.raises(DeliveryError) as caught:
            connection.deliver(make_envelope("ada@example.com", "bob@example.com"))

        assert connection.usable()
        connection.deliver(make_envelope())

    assert f"{caught.value}" == (
        f"All 2 recipients were refused by {server.settings()}:"
        " 554 5.7.1 <address> not ever (2 times)."
    )
    assert ("DATA" in server.commands[:5]) is pipelining
    assert server.commands.count("RSET") == 1
    assert len(server.taken) == 1


def test_everybody_is_refused_and_the_message_asked_for() -> None:
    """A server that waits for a message to nobody is hung up on."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.RCPT, Fault.PERMANENT)
        server.fail(Stage.DATA, b"354 go ahead\r\n")

        with pytest.raises(DeliveryError, match="The recipient was refused"):
            connection.deliver(make_envelope())

        assert not connection.usable()

    assert not server.complete


def test_the_sender_is_refused_and_the_message_asked_for() -> None:
    """No empty message goes to recipients that a confused server has accepted."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.MAIL, Fault.PERMANENT)

        with pytest.raises(DeliveryError, match="The message was refused"):
            connection.deliver(make_envelope())

        assert not connection.usable()

    assert not server.taken


def test_a_refused_sender_ends_it_early() -> None:
    """Of many recipients only the first write is sent after a sender is refused."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.MAIL, Fault.PERMANENT)
        recipients = [f"{number}@example.com" for number in range(1_000)]

        with pytest.raises(DeliveryError, match=r"message was refused by .*: 554"):
            connection.deliver(make_envelope(*recipients))

        assert len(server.commands) < 400
        connection.deliver(make_envelope())

    assert len(server.taken) == 1


@pytest.mark.parametrize("end", [Fault.DROP, Fault.BUSY])
def test_a_refusal_stands_when_the_server_hangs_up(end: Fault) -> None:
    """What was refused is reported as refused, and not as a lost connection."""
    with ScriptedServer() as server:
        server.fail(Stage.RCPT, Fault.PERMANENT)
        server.fail(Stage.DATA, end)
        error = fail_to_send(server.settings())

    assert not isinstance(error, ConnectionLost)
    assert "The recipient was refused" in f"{error}"


def test_a_reset_that_fails_closes_the_connection() -> None:
    """A server that can't forget a transaction gets no other one to mix it up with."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.DATA, Fault.TEMPORARY)
        server.fail(Stage.RSET, Fault.PERMANENT)

        with pytest.raises(DeliveryError, match=r"message was refused by .*: 451"):
            connection.deliver(make_envelope())

        assert not connection.usable()


@pytest.mark.parametrize("answer", [b"354 go ahead\r\n", b"334 \r\n"])
def test_an_answer_that_makes_no_sense_after_the_message(answer: bytes) -> None:
    """A message is not known to be taken if the server asks for something."""
    with ScriptedServer() as server:
        server.fail(Stage.DOT, answer)
        error = fail_to_send(server.settings())

    assert isinstance(error, DeliveryUnknown)


def test_unknown_says_what_to_look_for() -> None:
    """The error of a message whose fate is not known says why, and what to do."""
    with ScriptedServer() as server:
        server.fail(Stage.DOT, Fault.DROP)
        error = fail_to_send(server.settings())

    assert isinstance(error, DeliveryUnknown)
    assert f"{error}" == (
        "The message may or may not have been delivered: The connection to"
        f" {server.settings()} failed at the end of the message: the server closed it."
        " The server already had all of it, so it is not sent again. Look for it in the"
        " server's log. If the server is slow, raise APITASK_MAIL_TIMEOUT."
    )


@pytest.mark.parametrize(
    "answer",
    [
        b"250-one\r\n251 other\r\n",
        b"199 too low\r\n",
        b"600 too high\r\n",
        b"25\r\n",
        b"2500 too long\r\n",
        b"\r\n",
        b"250-" + b"x" * 70_000,
        b"250-x\r\n" * 10_000,
    ],
    ids=range(8),
)
def test_not_a_reply(answer: bytes) -> None:
    """An answer that is not an SMTP reply, or is endless, breaks the connection."""
    with ScriptedServer() as server:
        server.fail(Stage.MAIL, answer)
        error = fail_to_send(server.settings())

    assert isinstance(error, ConnectionLost)
    assert "failed at MAIL: the server's answer " in f"{error}"


def test_a_reply_without_text() -> None:
    """A bare code is a reply (RFC 5321, section 4.2)."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.MAIL, b"250\r\n")
        server.fail(Stage.RCPT, b"250 \n")
        connection.deliver(make_envelope())

    assert len(server.taken) == 1


def test_a_reply_nobody_asked_for() -> None:
    """A second reply to one command is not taken for the reply to the next one."""
    with ScriptedServer(pipelining=False) as server:
        server.fail(Stage.MAIL, b"250 ok\r\n250 ok\r\n")
        error = fail_to_send(server.settings())

    assert f"{error}" == (
        f"The connection to {server.settings()} failed at RCPT: the server said"
        " '250 ok' out of turn."
    )


def test_a_reply_in_the_middle_of_a_message() -> None:
    """A server that refuses a message before its end is heard, and not talked over."""
    with ScriptedServer() as server:
        server.fail(Stage.DATA, b"354 go ahead\r\n552 5.3.4 too big\r\n")
        error = fail_to_send(server.settings())

    assert isinstance(error, ConnectionLost)
    assert (
        "failed at the message: the server said '552 5.3.4 too big' out of turn"
        in f"{error}"
    )


def test_a_message_taken_and_the_connection_closed() -> None:
    """What follows the reply to a message does not make a delivered one a failure."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.DOT, b"250 taken\r\n421 but that was all\r\n")
        connection.deliver(make_envelope())
        assert not connection.usable()


class Trickle:
    """A listener that does with a connection what a function says."""

    def __init__(
        self, serve: cabc.Callable[[socket.socket], None], buffer: int | None = None
    ) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))

        if buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)

        self._thread = threading.Thread(target=self._run)
        self.stop = threading.Event()
        self.sent = 0

    def __enter__(self) -> Trickle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def settings(self, **changes: t.Any) -> SMTPSettings:
        port = self._listener.getsockname()[1]
        return SMTPSettings(
            **{"host": "localhost", "port": port, "timeout": SHORT} | changes
        )

    def _run(self) -> None:
        with self._listener, self._listener.accept()[0] as sock:
            with contextlib.suppress(OSError, Ended):
                self._serve(sock)


def trickle(sock: socket.socket, server: Trickle, octets: bytes) -> None:
    """Send something in bytes, until it is told to stop."""
    for octet in octets:
        sock.sendall(bytes([octet]))
        server.sent += 1

        if server.stop.wait(SHORT / 10):
            return


@pytest.mark.parametrize("octets", [b"2" * 1_000, b"220-\r\n" * 200])
def test_a_trickle_is_not_a_reply(octets: bytes) -> None:
    """A reply that keeps coming but never ends is timed out."""
    with Trickle(lambda sock: trickle(sock, server, octets)) as server:
        began = time.monotonic()
        error = fail_to_send(server.settings())
        assert time.monotonic() - began >= SHORT

    # Ten bytes arrive in that time.
    assert server.sent < 20
    assert "failed at the greeting: it took more than 0.3 s" in f"{error}"


def test_what_is_left_of_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a reply does not start the timeout anew for the other half."""
    clock = Clock(monkeypatch)

    def serve(sock: socket.socket) -> None:
        # The time for the reply has begun.
        assert clock.asked.wait(PATIENCE)
        clock.pass_by(TIMEOUT * 0.99)
        sock.sendall(b"22")
        sock.recv(1)

    with Trickle(serve) as server:
        began = time.monotonic()
        fail_to_send(server.settings(timeout=TIMEOUT))
        assert time.monotonic() - began < TIMEOUT / 2


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_server_that_stops_reading(
    certificates: Certificates, *, encrypted: bool
) -> None:
    """A message that the server takes byte by byte, or stops taking, is timed out."""
    envelope = make_envelope(body="x" * 20_000_000)
    context = certificates.context("localhost") if encrypted else None

    with (
        ScriptedServer(tls=context) as server,
        unhurried(server),
        connect(server.settings(tls_verify=certificates.cafile)) as connection,
    ):
        server.fail(Stage.DATA, Fault.STALL)
        connection.settings = server.settings(timeout=SHORT)

        with pytest.raises(ConnectionLost, match=r"at the message: .* than 0\.3 s"):
            connection.deliver(envelope)

    # Thirty are taken in that time.
    assert server.crumbs < 60


def test_a_slow_line_is_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message may take longer than the timeout if it makes steady progress."""
    clock = Clock(monkeypatch)

    def read_slowly(sock: socket.socket) -> None:
        sock.sendall(b"220 x\r\n")

        for answer in (b"250 x\r\n", *[b"250 ok\r\n"] * 2, b"354 go\r\n"):
            sock.recv(4096)
            sock.sendall(answer)

        received = b""

        while not received.endswith(b"\r\n.\r\n"):
            received = received[-5:] + sock.recv(60_000)
            clock.pass_by(TIMEOUT / 10)

        sock.sendall(b"250 taken\r\n")
        sock.recv(4096)

    with Trickle(read_slowly, buffer=65_536) as server:
        with connect(server.settings(timeout=TIMEOUT)) as connection:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            connection.sock = noted = mock.Mock(wraps=connection.sock)
            connection.deliver(make_envelope(body="x" * 4_000_000))

    sizes = []

    for before, call in itertools.pairwise(noted.method_calls):
        if call[0] == "sendall":
            # Each part has the whole timeout.
            assert before == mock.call.settimeout(TIMEOUT)
            sizes.append(len(call.args[0]))

    assert sum(sizes) > 4_000_000
    assert max(sizes) <= 16_384


def test_connecting_is_timed_out() -> None:
    """A host that does not answer at all costs the timeout, and no more."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        fillers = []

        try:
            # Until nobody else is let into the queue of those to be accepted.
            with contextlib.suppress(TimeoutError):
                while True:
                    filler = socket.socket()
                    fillers.append(filler)
                    filler.settimeout(SHORT)
                    filler.connect(listener.getsockname())

            port = listener.getsockname()[1]
            error = fail_to_send(
                SMTPSettings(host="127.0.0.1", port=port, timeout=SHORT)
            )
        finally:
            for filler in fillers:
                filler.close()

    assert "failed at the TCP connect: it took more than 0.3 s" in f"{error}"


def test_nobody_listens() -> None:
    """A refused TCP connection is reported with the system's reason."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    error = fail_to_send(SMTPSettings(host="127.0.0.1", port=port))
    assert isinstance(error, ConnectionLost)
    assert f"{error}" == (
        f"The connection to the mail server at '127.0.0.1:{port}' failed at the TCP"
        f" connect: {ConnectionRefusedError(errno.ECONNREFUSED, 'Connection refused')}."
        " Check MAIL_SERVER and MAIL_PORT."
    )


@pytest.mark.parametrize("host", ["no such host.invalid", "x" * 70 + ".invalid"])
def test_no_such_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name that can't be looked up is reported as such."""
    look_up = socket.getaddrinfo

    def resolve(name: str, port: int, *_: t.Any) -> t.Any:
        # It encodes the name, and asks nobody for it.
        return look_up(name, port, flags=socket.AI_NUMERICHOST)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    error = fail_to_send(SMTPSettings(host=host, port=25))
    assert f"server at '{host}:25' failed at the TCP connect: " in f"{error}"


@pytest.mark.parametrize("implicit", [True, False])
def test_the_certificate_is_verified(
    certificates: Certificates, *, implicit: bool
) -> None:
    """By default only a certificate of a trusted authority will do."""
    context = certificates.context("localhost")

    with ScriptedServer(tls=context, implicit=implicit, user=USER) as server:
        error = fail_to_send(server.settings())

        with connect(server.settings(tls_verify=certificates.cafile)) as connection:
            connection.deliver(make_envelope())

        with connect(server.settings(tls_verify=False)) as connection:
            connection.deliver(make_envelope())

    assert not isinstance(error, ConnectionLost)
    assert f"{error}".startswith(
        f"The certificate of {server.settings()} could not be verified: "
    )
    assert len(server.taken) == 2
    assert sum(line.startswith("AUTH") for line in server.commands) == 2


@pytest.mark.parametrize("implicit", [True, False])
def test_the_host_name_is_verified(
    certificates: Certificates, *, implicit: bool
) -> None:
    """The certificate of another host is not accepted."""
    context = certificates.context("mail.example")

    with ScriptedServer(tls=context, implicit=implicit, user=USER) as server:
        error = fail_to_send(server.settings(tls_verify=certificates.cafile))

    assert "Hostname mismatch" in f"{error}"
    assert not any(line.startswith("AUTH") for line in server.commands)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_name_that_is_verified_is_the_one_asked_for(
    certificates: Certificates, host: str
) -> None:
    """A certificate may be for a name or for an address, and is for that alone."""
    with ScriptedServer(tls=certificates.context(host)) as server:
        settings = server.settings(tls_verify=certificates.cafile, host=host)

        with connect(settings) as connection:
            connection.deliver(make_envelope())

        other = {"localhost": "127.0.0.1", "127.0.0.1": "localhost"}[host]
        error = fail_to_send(dataclasses.replace(settings, host=other))

    assert "mismatch" in f"{error}"


@pytest.mark.parametrize("use", ["use_tls", "use_ssl"])
def test_a_handshake_is_timed_out(certificates: Certificates, use: str) -> None:
    """A server that goes silent when TLS is to begin costs the timeout."""

    def serve(sock: socket.socket) -> None:
        if use == "use_tls":
            sock.sendall(b"220 x\r\n")
            sock.recv(4096)
            sock.sendall(b"250-x\r\n250 STARTTLS\r\n")
            sock.recv(4096)
            sock.sendall(b"220 go\r\n")

        while sock.recv(4096):
            pass

    with Trickle(serve) as server, unhurried():
        began = time.monotonic()
        error = fail_to_send(server.settings(**{use: True}))
        assert SHORT <= time.monotonic() - began < SHORT + 3

    assert "failed at the TLS handshake: it took more than 0.3 s" in f"{error}"


def test_a_trickle_of_tls(certificates: Certificates) -> None:
    """Half a handshake is timed out, even if bytes keep coming."""
    tls = certificates.context("localhost")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    handshake = tls.wrap_bio(incoming, outgoing, server_side=True)

    def serve(sock: socket.socket) -> None:
        incoming.write(sock.recv(4096))

        with pytest.raises(ssl.SSLWantReadError):
            handshake.do_handshake()

        trickle(sock, server, outgoing.read())

    with Trickle(serve) as server:
        began = time.monotonic()
        error = fail_to_send(
            server.settings(use_ssl=True, tls_verify=certificates.cafile)
        )
        assert time.monotonic() - began >= SHORT

    assert server.sent < 20
    assert "failed at the TLS handshake: it took more than 0.3 s" in f"{error}"


def test_starttls_is_stripped() -> None:
    """Without the offer of STARTTLS no credential and no message is sent."""
    with ScriptedServer(user=USER) as server:
        error = fail_to_send(server.settings(use_tls=True))

    assert f"{error}".startswith(f"STARTTLS is not offered by {server.settings()}, so")
    assert server.commands == ["ehlo client.example"]


@pytest.mark.parametrize(
    "injected", [b"250-evil\r\n250 AUTH PLAIN\r\n", b"250 evil\r\n235 in\r\n", b"2"]
)
def test_plain_text_after_starttls(certificates: Certificates, injected: bytes) -> None:
    """Plain text after the STARTTLS reply is not read as if it came over TLS."""
    with ScriptedServer(tls=certificates.context("localhost"), user=USER) as server:
        server.fail(Stage.STARTTLS, b"220 go\r\n" + injected)
        error = fail_to_send(server.settings(tls_verify=certificates.cafile))

    assert f"{error}".startswith("Plain text follows the STARTTLS reply of ")
    assert server.commands == ["ehlo client.example", "STARTTLS"]


def test_plain_text_after_starttls_that_comes_late() -> None:
    """Plain text in place of a handshake is an error of the handshake."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"220 x\r\n")
        sock.recv(4096)
        sock.sendall(b"250-x\r\n250 STARTTLS\r\n")
        sock.recv(4096)
        sock.sendall(b"220 go\r\n")
        sock.recv(4096)
        sock.sendall(b"250 evil\r\n")
        sock.recv(4096)

    with Trickle(serve) as server:
        error = fail_to_send(server.settings(use_tls=True))

    assert "failed at the TLS handshake: " in f"{error}"


def test_no_log_in_without_both_credentials() -> None:
    """AUTH is sent only if there are a user name and a password."""
    with ScriptedServer(user=USER) as server:
        for half in ({"username": None}, {"password": ""}):
            with connect(server.settings(**half)) as connection:
                connection.deliver(make_envelope())

    assert not any(line.startswith("AUTH") for line in server.commands)


def test_the_password_is_refused() -> None:
    """The error of a failed log-in has the code, and neither name nor password."""
    with ScriptedServer(user=USER) as server:
        server.fail(Stage.AUTH, b"535 5.7.8 me@example.com: no\r\n")
        error = fail_to_send(server.settings())

    assert not isinstance(error, ConnectionLost)
    assert f"{error}" == (
        f"The user name or the password was refused by {server.settings()}:"
        " 535 5.7.8 <address>: no. Check MAIL_USERNAME and MAIL_PASSWORD."
    )


@pytest.mark.parametrize("end", [Fault.DROP, Fault.BUSY])
def test_a_refused_log_in_stands_when_the_server_hangs_up(end: Fault) -> None:
    """The password is wrong, whatever becomes of the next way to log in."""
    with ScriptedServer(user=USER) as server:
        server.fail(Stage.EHLO, b"250-x\r\n250 AUTH PLAIN LOGIN\r\n")
        server.fail(Stage.AUTH, b"535 5.7.8 no\r\n", end)
        error = fail_to_send(server.settings())

    assert not isinstance(error, ConnectionLost)
    assert (error.stage, error.smtp_code) == ("AUTH", 535)
    assert "Check MAIL_USERNAME and MAIL_PASSWORD." in f"{error}"


@pytest.mark.parametrize("end", [Fault.DROP, Fault.BUSY])
@pytest.mark.parametrize("stage", [Stage.AUTH, Stage.EHLO])
def test_a_command_that_is_refused_does_not_stand(stage: Stage, end: Fault) -> None:
    """A server that knows no such command may be asked again, if it is busy then."""
    unknown = {Stage.AUTH: b"504 5.5.4 no\r\n", Stage.EHLO: b"502 5.5.1 no\r\n"}

    with ScriptedServer(user=USER) as server:
        if stage is Stage.AUTH:
            server.fail(Stage.EHLO, b"250-x\r\n250 AUTH PLAIN LOGIN\r\n")

        server.fail(stage, unknown[stage], end)
        error = fail_to_send(server.settings())

    assert isinstance(error, ConnectionLost)


@pytest.mark.parametrize("offer", [b"250 nothing\r\n", b"250-x\r\n250 AUTH GSSAPI\r\n"])
def test_no_way_to_log_in(offer: bytes) -> None:
    """A server that offers no AUTH, or only kinds that smtplib lacks, is named."""
    with ScriptedServer(user=USER) as server:
        server.fail(Stage.EHLO, offer)
        error = fail_to_send(server.settings())

    assert f"{error}".startswith(
        "smtplib knows none of the ways to log in that"
        f" {server.settings()} offers. If the server offers one only over TLS"
    )


def test_a_challenge_that_is_no_base64() -> None:
    """Nonsense in a challenge ends in an error about the log-in."""
    with ScriptedServer(user=USER) as server:
        server.fail(Stage.AUTH, b"334 x\r\n")
        assert "the ways to log in" in f"{fail_to_send(server.settings())}"


def test_a_password_outside_of_ascii() -> None:
    """A password that smtplib can't send is an error which does not show it."""
    with ScriptedServer(user=USER) as server:
        error = fail_to_send(server.settings(password="sécret"))

    assert "has a non-ASCII character" in f"{error}"


def test_endless_questions_are_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTH as a whole is bounded, however many questions the server has."""
    clock = Clock(monkeypatch)

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"220 x\r\n")
        sock.recv(4096)
        sock.sendall(b"250-x\r\n250 AUTH PLAIN LOGIN\r\n")

        for part in (0.6, 0.39):
            sock.recv(4096)
            clock.pass_by(TIMEOUT * part)
            sock.sendall(b"334 \r\n")

        while sock.recv(4096):
            pass

    with Trickle(serve) as server:
        user = {"username": USER[0], "password": USER[1]}
        began = time.monotonic()
        error = fail_to_send(server.settings(timeout=TIMEOUT, **user))
        assert time.monotonic() - began < TIMEOUT / 2

    assert "failed at AUTH: it took more than 20 s" in f"{error}"


def test_debug_shows_the_dialogue_without_credentials(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """MAIL_DEBUG writes to stderr what is said, except for AUTH."""
    with ScriptedServer(user=USER) as server:
        with connect(server.settings(debug=1)) as connection:
            connection.deliver(make_envelope())

    shown = capsys.readouterr().err
    assert "ehlo client.example" in shown
    assert "reply: b'250 2.1.0 ok" in shown
    assert "Subject: x" in shown
    assert "AUTH PLAIN " not in shown


def test_a_connection_serves_so_many_messages() -> None:
    """After the last message that it may send, a connection is not usable."""
    with ScriptedServer() as server:
        with connect(server.settings(max_messages=2)) as connection:
            connection.deliver(make_envelope())
            assert connection.usable()
            connection.deliver(make_envelope())
            assert not connection.usable()

        with connect(server.settings(max_messages=0)) as connection:
            connection.deliver(make_envelope())
            assert connection.usable()


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_dead_connection_is_noticed(
    certificates: Certificates, *, encrypted: bool
) -> None:
    """A connection that the server has closed is not usable, and asking is no I/O."""
    context = certificates.context("localhost") if encrypted else None

    with ScriptedServer(tls=context) as server:
        with connect(server.settings(tls_verify=certificates.cafile)) as connection:
            connection.deliver(make_envelope())
            assert connection.usable()
            flights = server.flights
            assert connection.usable()
            assert server.flights == flights
            server.hang_up()
            assert not connection.usable()


def test_a_reset_connection_is_noticed() -> None:
    """A connection that was reset is not usable, and ending it does not raise."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.reset()
        assert not connection.usable()


def test_an_interrupted_message_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that was left in the middle of a message gets no other command."""

    class Interrupted(BaseException):
        pass

    def interrupt(self: SMTPSession, envelope: Envelope) -> None:
        raise Interrupted

    with ScriptedServer() as server, connect(server.settings()) as connection:
        server.fail(Stage.DOT, Fault.SILENCE)
        monkeypatch.setattr(SMTPSession, "_check_end", interrupt)

        with pytest.raises(Interrupted):
            connection.deliver(make_envelope())

        assert not connection.usable()

    assert server.quits == 0


def test_one_port_for_each_kind_of_encryption() -> None:
    """Without a port it is the one that smtplib would take."""
    assert SMTPSettings().port == 25
    assert SMTPSettings(use_ssl=True).port == 465
    assert SMTPSettings(port=587).port == 587


def test_a_trust_store_is_loaded_once(certificates: Certificates) -> None:
    """The same trust settings share one TLS context, which is costly to load."""
    trusting = SMTPSettings(use_tls=True, tls_verify=certificates.cafile)
    context = trusting.tls_context()
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    other = dataclasses.replace(trusting, port=465, use_tls=False, use_ssl=True)
    assert other.tls_context() is context
    careless = dataclasses.replace(trusting, tls_verify=False).tls_context()
    assert careless is not None
    assert careless.verify_mode is ssl.CERT_NONE


def test_a_ca_file_that_does_not_exist() -> None:
    """A CA file that can't be read is named before anything is sent."""
    with pytest.raises(ValueError, match="'/does/not/exist' can't be loaded"):
        SMTPSettings(use_tls=True, tls_verify="/does/not/exist").tls_context()


def test_what_is_shown() -> None:
    """No repr has an address, a user name or a password."""
    shown = f"{make_envelope()} {SMTPSettings(username=USER[0], password=USER[1])}"
    assert "ada@" not in shown
    assert "root@" not in shown
    assert USER[0] not in shown
    assert USER[1] not in shown


@pytest.mark.parametrize(
    "fields",
    [
        {"sender": "root@example.com\r\nQUIT"},
        {"sender": "<root@example.com>\nQUIT"},
        {"recipients": ("ada@example.com", "<x@y>\0")},
        {"recipients": ("<\udc80@example.com>",)},
        {"mail_options": ("BODY=8BITMIME\r\nQUIT",)},
        {"rcpt_options": ("NOTIFY=NEVER\rQUIT",)},
    ],
    ids=range(6),
)
def test_no_commands_in_addresses(fields: dict[str, t.Any]) -> None:
    """Text that could be taken for a command is refused before it is sent."""
    with pytest.raises(ValueError, match="has a line break") as caught:
        make_envelope(**fields)

    assert "example.com\\" not in f"{caught.value}"


@pytest.mark.parametrize("name", ["mail_options", "rcpt_options"])
def test_options_outside_of_ascii(name: str) -> None:
    """They are an error where smtplib makes one: without SMTPUTF8."""
    options: dict[str, t.Any] = {name: ("X=ü",)}

    with pytest.raises(UnicodeEncodeError):
        make_envelope(**options)

    utf8 = make_envelope(mail_options=("smtputf8",), rcpt_options=("X=ü",))
    assert utf8.rcpt_options == ("X=ü",)


def test_a_recipient_given_twice() -> None:
    """A recipient given twice gets the message once, and is refused once."""
    twice = ("Ada <ada@example.com>", "ada@example.com")

    with ScriptedServer() as server, connect(server.settings()) as connection:
        connection.deliver(make_envelope(*twice))
        server.fail(Stage.RCPT, Fault.PERMANENT)
        server.fail(Stage.DATA, b"354 go ahead\r\n")

        with pytest.raises(DeliveryError, match="The recipient was refused"):
            connection.deliver(make_envelope(*twice))

    assert [message.recipients for message in server.taken] == [("ada@example.com",)]


def test_nobody_to_send_to() -> None:
    """An envelope without recipients can't be made."""
    with pytest.raises(ValueError, match="has no recipients"):
        make_envelope(recipients=())


def test_a_folded_name_is_no_line_break() -> None:
    """The display name is dropped before the address is looked at, as in smtplib."""
    with ScriptedServer() as server, connect(server.settings()) as connection:
        connection.deliver(make_envelope("A long\n name <ada@example.com>"))

    assert server.taken[0].recipients == ("ada@example.com",)
