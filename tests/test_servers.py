from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import json
import select
import signal
import socket
import struct
import subprocess
import typing as t

import pytest
import wsgi_servers_native  # noqa: F401
from conftest import wait_until
from gate import Gate
from mailbox_server import Mailbox
from servers_app import CHUNK
from wsgi_servers import KINDS
from wsgi_servers import serve

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from wsgi_servers import Kind
    from wsgi_servers import Launch
    from wsgi_servers import Server

pytestmark = pytest.mark.servers

# Seconds after which a server that does not answer or end has failed.
PATIENCE = 20.0
# Seconds in which a server that does not wait for its tasks would have ended.
STOP = 1.0
# The end of a body that is sent in chunks.
END = b"\r\n0\r\n\r\n"
# Seconds in which an answer that comes too early would be here.
MOMENT = 0.1
# Where there are no threads, a view waits for each of its tasks.
OVERLAPPING = [kind for kind in KINDS if not KINDS[kind].inline]


class Answer(t.NamedTuple):
    """A response that is here as a whole."""

    status: int
    text: str


@dataclasses.dataclass(frozen=True)
class Site:
    """The app under a server, and all that it needs."""

    server: Server
    gate: Gate
    mailbox: Mailbox
    journal: pathlib.Path

    def client(self) -> contextlib.closing[http.client.HTTPConnection]:
        """Make a connection for a block."""
        return contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        )

    def get(self, path: str) -> Answer:
        """Get a page over a connection of its own."""
        with self.client() as client:
            return ask(client, "GET", path)

    @contextlib.contextmanager
    def open(self, path: str) -> cabc.Iterator[socket.socket]:
        """Ask for a page over a socket, to look at the bytes of the response."""
        address = ("127.0.0.1", self.server.port)

        with socket.create_connection(address, PATIENCE) as connection:
            head = (
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            connection.sendall(head.encode())
            yield connection

    @property
    def kind(self) -> Kind:
        """Return what is known of the kind of server."""
        return KINDS[self.server.kind]

    def done(self) -> list[str]:
        """Return what tasks have noted."""
        return self.journal.read_text("utf-8").splitlines()


@contextlib.contextmanager
def start(
    kind: str,
    folder: pathlib.Path,
    *options: str,
    app: str = "servers_app:app",
    **config: str,
) -> cabc.Iterator[Site]:
    """Serve an app for a block; other keywords are keys of its configuration."""
    journal = folder / "journal"
    journal.touch()

    with contextlib.closing(Gate()) as gate, Mailbox() as mailbox:
        keys = {
            "GATE_PORT": str(gate.port),
            "JOURNAL": str(journal),
            "MAIL_PORT": str(mailbox.port),
            **config,
        }
        env = {f"FLASK_{key}": value for key, value in keys.items()}

        with serve(kind, app, env=env, options=options) as server:
            yield Site(server, gate, mailbox, journal)


def ask(
    client: http.client.HTTPConnection, method: str, path: str, body: bytes = b""
) -> Answer:
    """Send a request, and read the whole response."""
    client.request(method, path, body)
    return read(client)


def read(client: http.client.HTTPConnection) -> Answer:
    """Read the whole response of the request that was sent."""
    with client.getresponse() as response:
        return Answer(response.status, response.read().decode())


def is_silent(connection: socket.socket, expected: bool = True) -> bool:
    """Tell whether a server sends nothing, not even the end of the connection.

    :param expected: The result that a test expects. An expected answer may take longer.
    """
    seconds = MOMENT if expected else PATIENCE
    return not select.select([connection], [], [], seconds)[0]


def receive_until(
    connection: socket.socket, text: bytes, received: bytes = b""
) -> bytes:
    """Receive up to a text, and maybe more, and return all that came."""
    while text not in received:
        more = connection.recv(65536)
        assert more, f"the connection ends after {received!r}"
        received += more

    return received


def receive_rest(connection: socket.socket, received: bytes) -> bytes:
    """Receive what is on its way, and fail if the connection ends."""
    while not is_silent(connection):
        more = connection.recv(65536)
        assert more, f"the connection ends after {received!r}"
        received += more

    return received


def receive_all(connection: socket.socket) -> bytes:
    """Receive until the server closes the connection."""
    return b"".join(iter(functools.partial(connection.recv, 65536), b""))


def check_reset(site: Site) -> None:
    """Reset a connection in mid-body, and look what becomes of task and worker."""
    with site.open("/large/large") as connection:
        receive_until(connection, CHUNK[:1024])

        with site.gate.hold("large"):
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            connection.close()
            assert "large" not in site.done()

        wait_until(lambda: {"large", "large is left"} <= set(site.done()))

    assert site.get("/note/after-large") == (200, "after-large")


@pytest.fixture(scope="module", params=list(KINDS))
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> cabc.Iterator[Site]:
    """Serve the app in default mode, once for each kind of server."""
    folder = tmp_path_factory.mktemp("site")

    with start(request.param, folder, APITASK_MAIL_KEEPALIVE="0") as site:
        yield site


@pytest.fixture
def site(running: Site) -> cabc.Iterator[Site]:
    """Return the app under a server, and wait for its connections to end."""
    yield running
    wait_until(lambda: not running.mailbox.transports)


@pytest.fixture(scope="module", params=OVERLAPPING)
def running_first(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> cabc.Iterator[Site]:
    """Serve the app that answers first, once for each kind of server."""
    config = {"APITASK_MAIL_KEEPALIVE": "0", "APITASK_WAIT": "close"}

    with start(request.param, tmp_path_factory.mktemp("site"), **config) as site:
        yield site


@pytest.fixture
def first(running_first: Site) -> cabc.Iterator[Site]:
    """Return the app that answers first, and wait for its connections to end."""
    yield running_first
    wait_until(lambda: not running_first.mailbox.transports)


PATHS = [("/work/200", 200), ("/abort/418", 418), ("/error/500", 500)]


@pytest.mark.parametrize(("path", "status"), PATHS)
def test_the_response_comes_after_the_task(site: Site, path: str, status: int) -> None:
    """No byte of a response or error page is sent before its task is done."""
    with site.client() as client:
        client.request("GET", path)

        with site.gate.hold(str(status)):
            assert is_silent(client.sock)

        assert read(client).status == status
        assert str(status) in site.done()


def test_the_response_comes_after_the_mails(site: Site) -> None:
    """The mail server has taken the mails of a request before it is answered."""
    site.mailbox.lock()

    with site.client() as client:
        client.request("POST", "/mail/order")
        assert is_silent(client.sock)
        site.mailbox.unlock()
        assert read(client) == (200, "order")
        subjects = [name for name in site.mailbox.subjects if name.startswith("order")]
        assert sorted(subjects) == ["order 1", "order 2"]


def test_head(site: Site) -> None:
    """A response without a body comes after the task as well."""
    with site.client() as client:
        client.request("HEAD", "/work/head")

        with site.gate.hold("head"):
            assert is_silent(client.sock)

        assert read(client) == (200, "")
        assert "head" in site.done()


def test_stream(site: Site) -> None:
    """A stream that starts a task ends after it; what the view sends before comes."""
    if site.kind.inline:
        pytest.skip("the task is done before the view sends anything more")

    with site.open("/stream/stream") as connection:
        begin = receive_until(connection, b"first\n")

        with site.gate.hold("stream"):
            begin = receive_until(connection, b"last\n", begin)

            assert END not in receive_rest(connection, begin)

        assert b"last" not in receive_all(connection)
        assert "stream" in site.done()


def test_several_requests_of_a_connection(site: Site) -> None:
    """Each request of a connection that is kept waits for its own tasks."""
    with site.client() as client:
        connections = set()

        for name in ("keep-1", "keep-2", "keep-3"):
            assert ask(client, "GET", f"/note/{name}") == (200, name)
            assert name in site.done()
            connections.add(client.sock)

    assert (len(connections) == 1 and None not in connections) == site.kind.keeps_alive


def test_a_client_that_goes(site: Site) -> None:
    """A client that resets its connection in mid-body stops neither task nor worker."""
    check_reset(site)
    assert "after-large" in site.done()


def test_a_task_that_fails(site: Site) -> None:
    """It leaves the response and the other task alone, and is logged once."""
    assert site.get("/fail/fail") == (200, "fail")
    assert "fail" in site.done()
    assert (
        site.server.output().count(
            "Task 'servers_app.fail' of GET /fail/<name> failed after"
        )
        == 1
    )
    assert site.server.output().count("LookupError: on purpose") == 1


def test_a_view_that_fails(site: Site) -> None:
    """The error of a view is logged once, as without tasks."""
    with site.client() as client:
        client.request("GET", "/error/broken")

        with site.gate.hold("broken"):
            pass

        assert read(client).status == 500

    assert site.server.output().count("the view of broken fails\n") == 1


@pytest.mark.parametrize("size", [10, 2_000_000])
def test_an_upload_that_a_task_reads(site: Site, size: int) -> None:
    """A task can read an uploaded file, kept in memory or on disk."""
    content = bytes(range(250)) * (size // 250 + 1)
    head = b"--xyz\r\nContent-Disposition: form-data; name=file; filename=f\r\n\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=xyz"}

    with site.client() as client:
        client.request(
            "POST", f"/form/file-{size}", head + content + b"\r\n--xyz--\r\n", form
        )
        assert read(client) == (200, f"file-{size}")

    assert f"file-{size} {hashlib.sha256(content).hexdigest()}" in site.done()


def test_a_body_that_a_task_reads(site: Site) -> None:
    """A task can read from the connection what the view has not."""
    content = bytes(range(250)) * 8000

    with site.client() as client:
        assert ask(client, "POST", "/body/body", content) == (200, "body")

    assert f"body {hashlib.sha256(content).hexdigest()}" in site.done()


def test_what_is_bound_to_a_thread(site: Site) -> None:
    """A view and its tasks never share it, and no task leaves any for a request."""
    if site.kind.inline:
        pytest.skip("this server lets no thread run but that of the request")

    for name in map(str, range(10)):
        answer = json.loads(site.get(f"/isolated/{name}").text)
        assert answer["found"] == {}
        assert answer["kept"] == {"owner": name}
        assert {"owner": name} not in answer["seen"]


def test_requests_that_wait_at_once(site: Site) -> None:
    """While one waits for its task others are served, and each task sees its own."""
    if not site.kind.concurrent:
        pytest.skip("its worker serves one request at a time")

    with site.client() as red, site.client() as blue:
        red.request("GET", "/look/red")
        blue.request("GET", "/look/blue")

        with site.gate.hold("red", "blue") as held:
            assert site.get("/note/meanwhile") == (200, "meanwhile")
            held.let_pass("blue")
            assert read(blue) == (200, "blue /look/blue servers_app")
            held.let_pass("red")
            assert read(red) == (200, "red /look/red servers_app")


@pytest.mark.parametrize(("path", "status"), PATHS)
def test_the_answer_comes_first(first: Site, path: str, status: int) -> None:
    """With "close" a client has its response, or error page, before the task ends."""
    with first.client() as client:
        client.request("GET", path)

        with first.gate.hold(str(status)):
            assert read(client).status == status
            assert str(status) not in first.done()

    wait_until(lambda: str(status) in first.done())


def test_the_answer_comes_before_the_mails(first: Site) -> None:
    """With "close" a client has its response before the mail server takes the mails."""
    first.mailbox.lock()

    with first.client() as client:
        assert ask(client, "POST", "/mail/order") == (200, "order")
        assert first.mailbox.subjects == []

    first.mailbox.unlock()
    wait_until(lambda: sorted(first.mailbox.subjects) == ["order 1", "order 2"])


def test_head_with_the_answer_first(first: Site) -> None:
    """A response without a body comes first, too, unless the server holds it back."""
    with first.client() as client:
        client.request("HEAD", "/work/head")

        with first.gate.hold("head"):
            waits = not first.kind.ends_empty
            assert is_silent(client.sock, waits) == waits

        assert read(client) == (200, "")

    wait_until(lambda: "head" in first.done())


def test_stream_with_the_answer_first(first: Site) -> None:
    """The whole stream comes first, or all but its end where a server holds that."""
    with first.open("/stream/stream") as connection:
        body = receive_until(connection, b"first\n")

        with first.gate.hold("stream"):
            body = receive_until(connection, b"last\n", body)

            if first.kind.ends_streams:
                receive_until(connection, END, body)
            else:
                assert END not in receive_rest(connection, body)

    wait_until(lambda: "stream" in first.done())


def test_the_next_request_with_the_answer_first(first: Site) -> None:
    """The next request of a connection waits for the tasks, on most servers."""
    if not first.kind.keeps_alive:
        pytest.skip("it takes one request from a connection")

    with first.client() as client:
        client.request("GET", "/work/next")

        with first.gate.hold("next"):
            assert read(client) == (200, "next")
            client.request("GET", "/plain")
            waits = first.kind.holds_connection
            assert is_silent(client.sock, waits) == waits

        assert read(client) == (200, "plain")

    wait_until(lambda: "next" in first.done())


def test_a_client_that_goes_with_the_answer_first(first: Site) -> None:
    """A client that resets its connection in mid-body stops neither task nor worker."""
    check_reset(first)
    wait_until(lambda: "after-large" in first.done())


def test_a_task_that_fails_with_the_answer_first(first: Site) -> None:
    """Its failure is logged once, though the request is over."""
    assert first.get("/fail/fail") == (200, "fail")
    failure = "Task 'servers_app.fail' of GET /fail/<name> failed after"
    wait_until(lambda: failure in first.server.output() and "fail" in first.done())
    assert first.server.output().count(failure) == 1


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_a_stop_after_the_answer(kind: str, tmp_path: pathlib.Path) -> None:
    """On SIGTERM the tasks of a request that was answered first are done."""
    if not KINDS[kind].graceful:
        pytest.skip("it does not wait for anything")

    with start(kind, tmp_path, APITASK_WAIT="close") as site, site.client() as client:
        client.request("GET", "/work-and-mail/stop")

        with site.gate.hold("stop"):
            assert read(client) == (200, "stop")
            site.server.signal(signal.SIGTERM)

            with pytest.raises(subprocess.TimeoutExpired):
                site.server.wait(STOP)

        assert site.server.wait(PATIENCE) in (0, -signal.SIGTERM)
        assert site.done() == ["stop"]
        assert site.mailbox.subjects == ["stop"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_in_the_middle_of_a_request(kind: str, tmp_path: pathlib.Path) -> None:
    """On SIGTERM a request gets its response, and the mail of its task is sent."""
    with start(kind, tmp_path) as site, site.client() as client:
        client.request("GET", "/work-and-mail/stop")

        with site.gate.hold("stop"):
            site.server.signal(signal.SIGTERM)

            if not KINDS[kind].graceful:
                with pytest.raises((ConnectionError, http.client.HTTPException)):
                    read(client)

                return

            assert is_silent(client.sock)

        assert read(client) == (200, "stop")
        assert site.done() == ["stop"]
        assert site.mailbox.subjects == ["stop"]
        assert site.server.wait(PATIENCE) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "preload" in kind])
def test_a_fork_after_use(kind: str, tmp_path: pathlib.Path) -> None:
    """A worker of a master that has run tasks runs its own, and talks for itself."""
    with start(kind, tmp_path, WARM="1") as site:
        subjects = ["warm 1", "warm 2"]
        assert sorted(site.mailbox.subjects) == subjects
        before = set(map(id, site.mailbox.sessions))

        with site.client() as client:
            assert ask(client, "POST", "/mail/fork") == (200, "fork")

        assert sorted(site.mailbox.subjects) == ["fork 1", "fork 2", *subjects]
        assert before.isdisjoint(map(id, site.mailbox.sessions[2:]))
        site.server.signal(signal.SIGTERM)
        assert site.server.wait(PATIENCE) == 0


def test_a_reload(tmp_path: pathlib.Path) -> None:
    """The tasks of all requests that were answered around a reload were done."""
    module = tmp_path / "module.py"
    module.touch()
    options = ["--extra-files", str(module)]

    with start("werkzeug", tmp_path, *options) as site:
        answered: list[str] = []
        old = site.get("/process").text
        module.write_text("changed = True\n")
        process = old

        while process == old or not answered[-1].endswith(process):
            with contextlib.suppress(OSError, http.client.HTTPException):
                process = site.get("/process").text
                answered.append(site.get(f"/note/{len(answered)}-{process}").text)

        assert set(answered) <= set(site.done())
        assert "Detected change" in site.server.output()


def test_a2wsgi_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """It sends the headers at once: a response without a body comes before the task."""
    kind = KINDS["a2wsgi-uvicorn"]

    def command(launch: Launch) -> list[str]:
        return ["uvicorn", "--port", str(launch.port), "servers_asgi:app"]

    monkeypatch.setitem(KINDS, "alone", dataclasses.replace(kind, command=command))

    with start("alone", tmp_path) as site, site.client() as client:
        client.request("HEAD", "/work/head")

        with site.gate.hold("head"):
            assert read(client) == (200, "")
            assert site.done() == []


def test_waitress_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Its own program is killed by SIGTERM, in the middle of a request."""
    kind = KINDS["waitress"]

    def command(launch: Launch) -> list[str]:
        return ["waitress-serve", f"--listen=127.0.0.1:{launch.port}", launch.app]

    monkeypatch.setitem(KINDS, "alone", dataclasses.replace(kind, command=command))

    with start("alone", tmp_path) as site, site.client() as client:
        client.request("GET", "/work/stop")

        with site.gate.hold("stop"):
            site.server.signal(signal.SIGTERM)
            assert site.server.wait(PATIENCE) == -signal.SIGTERM
            assert site.done() == []
