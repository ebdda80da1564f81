from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import os
import pathlib
import pwd
import socket
import ssl
import struct
import subprocess
import sys
import threading
import typing as t

import trustme
from conftest import wait_until

from flask_apitask.mail.envelope import Envelope
from flask_apitask.mail.envelope import SMTPSettings

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Seconds after which a test that waits for the other side has failed.
PATIENCE = 20.0


class Stage(enum.Enum):
    """The places in a dialogue at which a server answers."""

    GREETING = "greeting"
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    DOT = "after the dot"
    RSET = "RSET"
    QUIT = "QUIT"


class Fault(enum.Enum):
    """What a server does in place of answering."""

    DROP = "drop"
    RESET = "reset"
    SILENCE = "silence"
    TEMPORARY = "4xx"
    PERMANENT = "5xx"
    BUSY = "421"
    GARBAGE = "garbage"
    HALF = "half a line"
    STALL = "takes a message a byte at a time"


class Taken(t.NamedTuple):
    """A message for which the server gave its word."""

    message_id: str
    recipients: tuple[str, ...]
    content: bytes


class Ended(Exception):
    """Raised when a connection is over."""


_REFUSALS = {
    Fault.TEMPORARY: b"451 4.3.0 <ada@example.com> not now",
    Fault.PERMANENT: b"554 5.7.1 <ada@example.com> not ever",
    Fault.BUSY: b"421 4.7.0 too many connections",
}


class ScriptedServer:
    """A mail server that does what a test tells it to, and keeps a ledger.

    :param tls: Offer ``STARTTLS`` with this certificate, or speak TLS at once if
        ``implicit`` is set.
    :param user: Offer ``AUTH`` once the connection is encrypted, or if it never is.
    :param buffer: Bytes that the system keeps for it in each direction.
    :param allowed: Most connections at once.
    :param refusal: What those beyond it meet, and where.
    :param delay: Seconds that it takes for a message.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        user: tuple[str, str] | None = None,
        pipelining: bool = True,
        extensions: tuple[str, ...] = ("SIZE 10000000", "8BITMIME"),
        buffer: int | None = None,
        allowed: int | None = None,
        refusal: tuple[Stage, Fault | bytes] = (Stage.GREETING, Fault.BUSY),
        delay: float = 0.0,
    ) -> None:
        self.tls = tls
        self.implicit = implicit
        self.user = user
        self.pipelining = pipelining
        self.extensions = extensions
        self.allowed = allowed
        self.refusal = refusal
        self.delay = delay
        self.refused = 0
        self.stopped = threading.Event()
        # Guards everything below.
        self.changed = threading.Condition()
        self.taken: list[Taken] = []
        self.complete: collections.Counter[str] = collections.Counter()
        self.commands: list[str] = []
        self.quits = 0
        # How often the other side had to have read an answer before it went on.
        self.flights = 0
        self.connects = 0
        self.most_open = 0
        # The number of message bytes that were read one at a time.
        self.crumbs = 0
        # The addresses of the clients that wait in vain.
        self.silent_to: set[object] = set()
        self._faults: dict[Stage, collections.deque[Fault | bytes | None]] = (
            collections.defaultdict(collections.deque)
        )
        self._open: dict[_Session, threading.Thread] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]

        if buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)

        self._accepting = threading.Thread(target=self._accept, name="scripted-server")

    def __enter__(self) -> ScriptedServer:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(PATIENCE)
        self._listener.close()
        self.hang_up()

    def settings(self, **changes: t.Any) -> SMTPSettings:
        """Return how to reach it."""
        settings: dict[str, t.Any] = {"port": self.port, "timeout": PATIENCE}
        settings["host"] = "localhost"

        if self.user is not None:
            settings["username"], settings["password"] = self.user

        if self.tls is not None:
            settings["use_ssl" if self.implicit else "use_tls"] = True

        return SMTPSettings(**(settings | changes))

    def fail(self, stage: Stage, *faults: Fault | bytes | None) -> None:
        """Do these at the next times that the stage comes; ``None`` is no fault.

        Bytes are answered as they are.
        """
        with self.changed:
            self._faults[stage].extend(faults)

    def reset(self) -> None:
        """Reset every connection, and return when that is done."""
        self.hang_up(_Session.will_reset)

    def hang_up(
        self, prepare: cabc.Callable[[_Session], object] = lambda session: None
    ) -> None:
        """Close every connection, and return when they are closed."""
        with self.changed:
            sessions = dict(self._open)

        for session in sessions:
            # It may have ended by now.
            with contextlib.suppress(OSError):
                prepare(session)
                session.hang_up()

        for thread in sessions.values():
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def wait_for(self, condition: cabc.Callable[[], bool]) -> None:
        """Wait until something about the server is so, and fail if it never is."""
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE), self.commands

    @property
    def open(self) -> int:
        return len(self._open)

    def count_flight(self) -> None:
        self.flights += 1

    def next_fault(self, stage: Stage) -> Fault | bytes | None:
        with self.changed:
            faults = self._faults[stage]
            return faults.popleft() if faults else None

    def note(self, change: cabc.Callable[[], object]) -> None:
        with self.changed:
            change()
            self.changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return

            session = _Session(self, sock)
            thread = threading.Thread(target=self._serve, args=[session])

            with self.changed:
                self.connects += 1
                wanted = sum(not session.unwanted for session in self._open)
                session.unwanted = self.allowed is not None and wanted >= self.allowed
                self.refused += session.unwanted
                self._open[session] = thread
                self.most_open = max(self.most_open, len(self._open))
                self.changed.notify_all()

            thread.start()

    def _serve(self, session: _Session) -> None:
        try:
            session.run()
        except (Ended, OSError):
            pass
        finally:
            session.sock.close()
            self.note(lambda: self._open.pop(session))


class _Session:
    def __init__(self, server: ScriptedServer, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.received = b""
        self.encrypted = False
        self.unwanted = False
        self.answered = False
        self.recipients: list[str] = []
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def hang_up(self) -> None:
        self.sock.shutdown(socket.SHUT_RD)

    def will_reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def run(self) -> None:
        if self.server.implicit:
            self.encrypt()

        self.answer(Stage.GREETING, b"220 scripted.example ESMTP")

        while True:
            line = self.read_line().decode()
            self.server.note(functools.partial(self.server.commands.append, line))
            verb = line.split()[0].split(":")[0].upper()
            getattr(self, f"on_{verb.lower()}", self.on_other)(line)

    def on_ehlo(self, line: str) -> None:
        lines = ["scripted.example", *self.server.extensions]
        lines += ["PIPELINING"] if self.server.pipelining else []

        if self.server.tls is not None and not self.encrypted:
            lines += ["STARTTLS"]
        elif self.server.user is not None:
            lines += ["AUTH PLAIN"]

        replies = [f"250-{text}" for text in lines[:-1]] + [f"250 {lines[-1]}"]
        self.answer(Stage.EHLO, "\r\n".join(replies).encode())

    def on_helo(self, line: str) -> None:
        self.answer(Stage.EHLO, b"250 scripted.example")

    def on_starttls(self, line: str) -> None:
        if self.answer(Stage.STARTTLS, b"220 2.0.0 go ahead"):
            self.encrypt()

    def on_auth(self, line: str) -> None:
        self.answer(Stage.AUTH, b"235 2.7.0 welcome")

    def on_mail(self, line: str) -> None:
        self.recipients = []
        self.answer(Stage.MAIL, b"250 2.1.0 ok")

    def on_rcpt(self, line: str) -> None:
        fault = self.begin(Stage.RCPT) or b"250 2.1.5 ok\r\n"
        self.play(fault)

        if isinstance(fault, bytes) and fault.startswith(b"25"):
            self.recipients.append(line.partition("<")[2].partition(">")[0])

    def on_data(self, line: str) -> None:
        if not self.recipients:
            self.answer(Stage.DATA, b"554 5.5.1 no valid recipients")
        elif self.answer(Stage.DATA, b"354 go ahead"):
            self.on_message()

    def on_message(self) -> None:
        while not (b"\r\n" + self.received).endswith(b"\r\n.\r\n"):
            self.receive()

        content = self.received.removesuffix(b".\r\n").replace(b"\r\n..", b"\r\n.")
        self.received = b""
        head = content.partition(b"\r\n")[0].decode()
        message_id = head.removeprefix("Message-ID: ")
        self.server.note(lambda: self.server.complete.update([message_id]))
        taken = Taken(message_id, tuple(self.recipients), content)
        # On the books before the reply is out, so that a test can look at them then.
        accepted = self.begin(Stage.DOT)

        self.server.stopped.wait(self.server.delay)

        if accepted is None:
            self.server.note(lambda: self.server.taken.append(taken))
            self.reply(b"250 2.0.0 taken")
        else:
            self.play(accepted)

    def on_quit(self, line: str) -> None:
        self.server.note(lambda: setattr(self.server, "quits", self.server.quits + 1))
        self.answer(Stage.QUIT, b"221 2.0.0 bye")
        raise Ended

    def on_rset(self, line: str) -> None:
        self.answer(Stage.RSET, b"250 2.0.0 ok")

    def on_other(self, line: str) -> None:
        self.reply(b"500 5.5.2 what?")

    def encrypt(self) -> None:
        assert self.server.tls is not None
        assert not self.received
        self.sock = self.server.tls.wrap_socket(self.sock, server_side=True)
        self.encrypted = True

    def answer(self, stage: Stage, reply: bytes) -> bool:
        """Answer, or do the fault that is due; tell whether it was the answer."""
        fault = self.begin(stage)

        if fault is None:
            self.reply(reply)
            return True

        self.play(fault)
        return False

    def begin(self, stage: Stage) -> Fault | bytes | None:
        if self.unwanted and stage is self.server.refusal[0]:
            return self.server.refusal[1]

        return self.server.next_fault(stage)

    def play(self, fault: Fault | bytes) -> None:
        if isinstance(fault, bytes):
            self.answered = True
            self.sock.sendall(fault)
        elif fault in _REFUSALS:
            self.reply(_REFUSALS[fault])

            if fault is Fault.BUSY:
                raise Ended
        elif fault is Fault.GARBAGE:
            self.reply(b"\xff\x00 whatever")
        elif fault is Fault.HALF:
            self.sock.sendall(b"250 2.0")
            raise Ended
        elif fault is Fault.DROP:
            raise Ended
        elif fault is Fault.RESET:
            self.will_reset()
            raise Ended
        elif fault is Fault.STALL:
            self.reply(b"354 go ahead")

            while not self.server.stopped.wait(0.01) and self.sock.recv(1):
                self.server.crumbs += 1

            raise Ended
        else:
            peer = self.sock.getpeername()
            self.server.note(lambda: self.server.silent_to.add(peer))

            # Silent until the other side has had enough.
            while True:
                self.receive()

    def reply(self, line: bytes) -> None:
        self.answered = True
        self.sock.sendall(line + b"\r\n")

    def read_line(self) -> bytes:
        while b"\r\n" not in self.received:
            self.receive()

        line, _, self.received = self.received.partition(b"\r\n")
        return line

    def receive(self) -> None:
        received = self.sock.recv(65_536)

        if not received:
            raise Ended

        if self.answered:
            self.answered = False
            self.server.note(self.server.count_flight)

        self.received += received


class Certificates:
    """A certificate authority of its own, and what it vouches for."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.authority = trustme.CA()
        self.cafile = str(folder / "ca.pem")
        self.authority.cert_pem.write_to_path(self.cafile)

    def context(self, *names: str) -> ssl.SSLContext:
        """Return what a server needs to be one of these hosts."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names).configure_cert(context)
        return context


class Postfix:
    """A Postfix of its own: configuration, queue and mailbox in one folder.

    It takes mail for ``ada@example.com`` and ``bob@example.com``, and nobody else.

    :param folder: The users ``postfix`` and ``nobody`` must be able to get there.
    :param connections: Most connections at once, further ones get a 421.
    """

    def __init__(
        self, folder: pathlib.Path, certificates: Certificates, connections: int
    ) -> None:
        self._folder = folder
        self._etc = folder / "etc"
        self._mail = folder / "mail"
        self._certificates = certificates
        self._connections = connections

        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]

    def __enter__(self) -> Postfix:
        self._write_configuration()
        self._command("check")  # which makes the folders of the queue
        self._process = subprocess.Popen(
            ["/usr/sbin/postfix", "-c", str(self._etc), "start-fg"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        try:
            wait_until(self._answers)
        except BaseException:
            self.__exit__()
            raise

        return self

    def __exit__(self, *_: object) -> None:
        self._command("stop")
        self._process.wait(PATIENCE)

    def settings(self, **changes: t.Any) -> SMTPSettings:
        """Return how to reach it."""
        settings: dict[str, t.Any] = {"host": "localhost", "port": self.port}
        settings |= {"use_tls": True, "tls_verify": self._certificates.cafile}
        return SMTPSettings(**(settings | changes))

    def mailbox(self, name: str) -> list[bytes]:
        """Return what was delivered to someone so far."""
        return [path.read_bytes() for path in self._mail.glob(f"{name}/new/*")]

    def _write_configuration(self) -> None:
        nobody = pwd.getpwnam("nobody")
        self._etc.mkdir()
        self._mail.mkdir()
        os.chown(self._mail, nobody.pw_uid, nobody.pw_gid)
        (self._folder / "queue").mkdir()
        (self._folder / "data").mkdir()
        os.chown(self._folder / "data", pwd.getpwnam("postfix").pw_uid, -1)
        pem = self._etc / "server.pem"
        issued = self._certificates.authority.issue_cert("localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(str(pem))
        pem.chmod(0o600)
        (self._etc / "main.cf").write_text(
            f"""\
compatibility_level = 3.6
queue_directory = {self._folder}/queue
data_directory = {self._folder}/data
maillog_file = {self._folder}/log
maillog_file_prefixes = {self._folder}
myhostname = localhost
mydestination =
local_recipient_maps =
mynetworks =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtpd_peername_lookup = no
smtpd_relay_restrictions = reject_unauth_destination
smtpd_tls_security_level = encrypt
smtpd_tls_chain_files = {pem}
smtpd_client_connection_count_limit = {self._connections}
smtpd_client_event_limit_exceptions =
virtual_mailbox_domains = example.com
virtual_mailbox_maps = inline:{{ ada@example.com=ada/, bob@example.com=bob/ }}
virtual_mailbox_base = {self._mail}
virtual_uid_maps = static:{nobody.pw_uid}
virtual_gid_maps = static:{nobody.pw_gid}
"""
        )
        (self._etc / "master.cf").write_text(
            f"""\
127.0.0.1:{self.port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
error unix - - n - - error
retry unix - - n - - error
proxymap unix - - n - - proxymap
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""
        )

    def _command(self, command: str) -> None:
        subprocess.run(
            ["/usr/sbin/postfix", "-c", str(self._etc), command],
            check=True,
            capture_output=True,
            timeout=PATIENCE * 3,
        )

    def _answers(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), PATIENCE) as sock,
        ):
            return sock.recv(3) == b"220"

        return False


def run_script(script: str, *arguments: str) -> str:
    """Run a script in an interpreter of its own, and return what it writes."""
    here = pathlib.Path(__file__).parent
    finished = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", script, *arguments],
        cwd=here,
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    return finished.stdout


@dataclasses.dataclass
class _Numbers:
    last: int = 0


_numbers = _Numbers()


def make_envelope(*recipients: str, body: str = "hello", **fields: t.Any) -> Envelope:
    """Make a message that no other one is like."""
    _numbers.last += 1
    message_id = f"<{_numbers.last}@example.com>"
    return Envelope(
        **{
            "sender": "root@example.com",
            "recipients": recipients or ("ada@example.com",),
            "content": f"Message-ID: {message_id}\nSubject: x\n\n{body}\n".encode(),
            "message_id": message_id,
        }
        | fields
    )
