"""Mail servers for the benchmark: aiosmtpd and Postfix, with STARTTLS and AUTH.

Each runs beside the process that measures, on 127.0.0.1 and a free port, with a
certificate of an authority made for the run. What they take they throw away.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import pathlib
import pwd
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import typing as t

import trustme
from aiosmtpd.smtp import AuthResult
from aiosmtpd.smtp import LoginPassword
from aiosmtpd.smtp import SMTP

from . import beside

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from aiosmtpd.smtp import Envelope
    from aiosmtpd.smtp import Session

USER: t.Final = "benchmark"
PASSWORD: t.Final = "no secret"
POSTFIX: t.Final = "/usr/sbin/postfix"
SECONDS: t.Final = 30.0

MAIN_CF: t.Final = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
myhostname = localhost
mydestination =
mynetworks =
local_recipient_maps =
default_transport = discard
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
in_flow_delay = 0
smtpd_peername_lookup = no
smtpd_client_connection_count_limit = 0
smtpd_relay_restrictions = permit_sasl_authenticated, reject
smtpd_sasl_auth_enable = yes
smtpd_sasl_type = dovecot
smtpd_sasl_path = inet:127.0.0.1:{auth_port}
smtpd_tls_security_level = encrypt
smtpd_tls_chain_files = {pem}
"""
MASTER_CF: t.Final = """\
127.0.0.1:{port} inet n - n - - smtpd
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
discard unix - - n - - discard
postlog unix-dgram n - n - 1 postlogd
"""


class Handler:
    """What aiosmtpd asks: it takes all mail that comes encrypted and logged in."""

    def __init__(self, pipelining: bool) -> None:
        self._pipelining = pipelining

    async def handle_EHLO(
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        hostname: str,
        responses: list[str],
    ) -> list[str]:
        """Offer ``PIPELINING``: aiosmtpd reads line by line, so it can, but doesn't."""
        session.host_name = hostname
        # The first line is the server's name, and the last one looks different.
        return [responses[0], *["250-PIPELINING"] * self._pipelining, *responses[1:]]

    async def handle_DATA(
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        """Take a message."""
        return "250 OK"


def authenticate(
    server: SMTP, session: Session, envelope: Envelope, mechanism: str, login: t.Any
) -> AuthResult:
    """Let the one user in."""
    is_right = login == LoginPassword(USER.encode(), PASSWORD.encode())
    return AuthResult(success=is_right, handled=False)


def serve(listener: socket.socket, pem: str, pipelining: bool) -> None:
    """Run aiosmtpd until the parent process is done.

    :param pem: the file with the certificate and its key; without one, there is
        neither encryption nor a log-in.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if pem else None

    if context is not None:
        context.load_cert_chain(pem)

    # It warns of what it does itself at every log-in.
    logging.getLogger("mail.log").setLevel(logging.ERROR)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(
            lambda: SMTP(
                Handler(pipelining),
                hostname="localhost",
                tls_context=context,
                require_starttls=context is not None,
                auth_required=context is not None,
                authenticator=authenticate,
                loop=loop,
            ),
            sock=listener,
            backlog=1024,
        )
        # What is open by then is ended with the process.
        await loop.run_in_executor(None, beside.wait_for_end)

    asyncio.run(run())


class PasswordServer(socketserver.StreamRequestHandler):
    """Says who may log in, as Postfix asks a Dovecot.

    It knows as much of `Dovecot's protocol
    <https://doc.dovecot.org/developer_manual/design/auth_protocol/>`_ as that needs.
    """

    def handle(self) -> None:
        """Answer until Postfix hangs up."""
        credentials = base64.b64encode(f"\0{USER}\0{PASSWORD}".encode())
        greeting = "VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nSPID\t1\nCUID\t1\n"
        self.wfile.write(f"{greeting}COOKIE\t{'0' * 32}\nDONE\n".encode())

        for line in self.rfile:
            command, *parameters = line.rstrip(b"\n").split(b"\t")

            if command == b"AUTH":
                answer = b"OK" if b"resp=" + credentials in parameters else b"FAIL"
                user = f"user={USER}\n".encode()
                self.wfile.write(b"\t".join([answer, parameters[0], user]))


class Servers(t.NamedTuple):
    """The mail servers that run: their ports, and whom to trust."""

    ports: dict[str, int]
    cafile: str


@contextlib.contextmanager
def running() -> cabc.Iterator[Servers]:
    """Run all mail servers that are installed for the length of a ``with`` block."""
    with contextlib.ExitStack() as stack:
        # The users of Postfix must be able to get there.
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="postfix-"))
        folder = pathlib.Path(name)
        folder.chmod(0o711)
        authority = trustme.CA()
        cafile, pem = folder / "ca.pem", folder / "server.pem"
        authority.cert_pem.write_to_path(str(cafile))
        issued = authority.issue_cert(beside.HOST)
        issued.private_key_and_cert_chain_pem.write_to_path(str(pem))
        pem.chmod(0o600)
        ports = {}

        for label, pipelining in (("no PIPELINING", ""), ("PIPELINING", "yes")):
            server = beside.listening(__name__, str(pem), pipelining)
            ports[label] = stack.enter_context(server)

        if shutil.which(POSTFIX) and os.geteuid() == 0:
            ports["Postfix"] = stack.enter_context(_postfix(folder, pem))

        yield Servers(ports, str(cafile))


def plain() -> contextlib.AbstractContextManager[int]:
    """Run aiosmtpd with neither encryption nor a log-in; give its port."""
    return beside.listening(__name__, "", "yes")


@contextlib.contextmanager
def _postfix(folder: pathlib.Path, pem: pathlib.Path) -> cabc.Iterator[int]:
    """Run a Postfix that has all of its own in *folder*; give its port."""
    etc = folder / "etc"

    for name in ("etc", "queue", "data"):
        (folder / name).mkdir()

    os.chown(folder / "data", pwd.getpwnam("postfix").pw_uid, -1)

    with socket.create_server((beside.HOST, 0)) as listener:
        port: int = listener.getsockname()[1]

    with socketserver.ThreadingTCPServer((beside.HOST, 0), PasswordServer) as passwords:
        values = {"folder": folder, "pem": pem, "port": port}
        values["auth_port"] = passwords.server_address[1]
        (etc / "main.cf").write_text(MAIN_CF.format_map(values))
        (etc / "master.cf").write_text(MASTER_CF.format_map(values))
        threading.Thread(target=passwords.serve_forever).start()

        try:
            subprocess.run([POSTFIX, "-c", etc, "start"], check=True, timeout=SECONDS)
            yield port
        finally:
            passwords.shutdown()
            subprocess.run([POSTFIX, "-c", etc, "stop"], check=True, timeout=SECONDS)


def main() -> None:
    """Serve as the parent process says."""
    fileno, pem, pipelining = sys.argv[1:]

    with socket.socket(fileno=int(fileno)) as listener:
        serve(listener, pem, bool(pipelining))


if __name__ == "__main__":
    main()
