"""Real WSGI servers, started as the pages in docs/deploying say."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing as t

import pytest

if t.TYPE_CHECKING:
    import collections.abc as cabc

CONFIGURATIONS = pathlib.Path(__file__).parents[1] / "docs" / "deploying"

_logger = logging.getLogger(__name__)

# Seconds after which a server that does not start has failed.
PATIENCE = 30.0
# Seconds that a server has to end by itself before it is killed.
GRACE = 5.0


class Launch(t.NamedTuple):
    """What a kind of server is started for.

    :param app: The app as ``module:name``.
    :param folder: An empty directory that lives as long as the server.
    """

    app: str
    port: int
    folder: pathlib.Path
    options: cabc.Sequence[str]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to serve an app.

    :param command: Make the command line.
    :param needs: Python modules or programs that have to be installed.
    :param forks: Requests are served by children of the process that is started.
    :param environ: Make environment variables for it.
    :param inline: A task runs on the spot, as the server lets no thread run.
    :param concurrent: One worker serves several requests at once.
    :param keeps_alive: It takes several requests from a connection.
    :param graceful: On SIGTERM it finishes the requests that it serves.
    :param ends_empty: It sends a response without a body before it closes it.
    :param ends_streams: It sends the end of a stream before it closes it.
    :param holds_connection: The next request of a connection is served after the
        response to the one before is closed.
    """

    command: cabc.Callable[[Launch], list[str]]
    needs: tuple[str, ...]
    forks: bool = False
    environ: cabc.Callable[[Launch], dict[str, str]] = lambda launch: {}
    inline: bool = False
    concurrent: bool = True
    keeps_alive: bool = True
    graceful: bool = True
    ends_empty: bool = True
    ends_streams: bool = True
    holds_connection: bool = True

    @property
    def missing(self) -> str | None:
        """Return what is not installed, if anything is not."""
        for name in self.needs:
            if shutil.which(name) is None and importlib.util.find_spec(name) is None:
                return name

        return None


class Server:
    """A server that runs, and the processes that it has.

    :param kind: The name of its kind, a key of :data:`KINDS`.
    :param process: The master.
    """

    def __init__(
        self,
        kind: str,
        port: int,
        process: subprocess.Popen[bytes],
        written: pathlib.Path,
    ) -> None:
        self.kind = kind
        self.port = port
        self.process = process
        self._written = written

    def url(self, path: str) -> str:
        """Return the address of a path that begins with a slash."""
        return f"http://127.0.0.1:{self.port}{path}"

    def workers(self) -> list[int]:
        """Return the processes that serve requests, as far as they are started."""
        pid = self.process.pid
        return _children(pid) if KINDS[self.kind].forks else [pid]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        self.process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Wait for the master's end, and return its exit code."""
        return self.process.wait(timeout)

    def output(self) -> str:
        """Return what all of its processes have written so far."""
        return self._written.read_text("utf-8", errors="replace")

    def connect(self) -> None:
        """Wait until it accepts connections, and has a process to serve them."""
        until = time.monotonic() + PATIENCE

        while not (self._accepts() and self.workers()):
            ended = self.process.poll()
            assert ended is None, f"{self.kind} exited with {ended}"
            assert time.monotonic() < until, f"{self.kind} is silent"
            time.sleep(0.02)

    def end(self) -> None:
        """Stop it, and kill what is left of its processes."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)

            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(GRACE)

        # Its workers may have survived it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

        self.process.wait(PATIENCE)

    def _accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), PATIENCE).close()
        except ConnectionRefusedError:
            return False

        return True


@contextlib.contextmanager
def serve(
    kind: str,
    app: str,
    *,
    env: cabc.Mapping[str, str] | None = None,
    options: cabc.Sequence[str] = (),
) -> cabc.Iterator[Server]:
    """Serve an app for a block, and end all processes of the server afterwards.

    The test is skipped where the server is not installed.

    :param kind: A key of :data:`KINDS`.
    :param app: The app as ``module:name``; the modules beside this one are found.
    :param env: Environment variables to add.
    :param options: More options for the command line. They win over those of the kind.
    """
    _require(kind)

    with (
        tempfile.TemporaryDirectory(
            prefix="server-", ignore_cleanup_errors=True
        ) as name,
        _reserved_port() as port,
    ):
        folder = pathlib.Path(name)
        launch = Launch(app, port, folder, options)
        written = folder / "output"
        process = _start(KINDS[kind], launch, written, env or {})
        server = Server(kind, port, process, written)

        try:
            server.connect()
            yield server
        except Exception:
            # pytest shows this next to the failure, whose cause may be the server.
            _logger.error("Workers: %s\n%s", server.workers(), server.output())
            raise
        finally:
            server.end()


def _require(kind: str) -> None:
    missing = KINDS[kind].missing

    if missing and os.environ.get("APITASK_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{missing} is not installed, which {kind} needs")
    elif missing:
        pytest.skip(f"{missing} is not installed, which {kind} needs")


@contextlib.contextmanager
def _reserved_port() -> cabc.Iterator[int]:
    """Keep a port that only who asks for it by its number can have."""
    with socket.socket() as reserved:
        # A server can listen where a socket is bound that does not, if both say so.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _start(
    kind: Kind,
    launch: Launch,
    written: pathlib.Path,
    env: cabc.Mapping[str, str],
) -> subprocess.Popen[bytes]:
    tests = pathlib.Path(__file__).parent
    paths = [str(tests), os.environ.get("PYTHONPATH")]
    programs = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    environ = {
        # Those of the tests would change what an app does.
        **{key: value for key, value in os.environ.items() if key[:6] != "FLASK_"},
        "PATH": os.pathsep.join(programs),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        **kind.environ(launch),
        **env,
    }

    with written.open("wb") as output:
        return subprocess.Popen(
            kind.command(launch),
            # Not the folder of the checkout: what is tested is what is installed.
            cwd=tests,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A process group of its own, to be killed as one.
            start_new_session=True,
        )


def _children(pid: int) -> list[int]:
    """Return the direct children of a process, without helpers of multiprocessing."""
    children = []

    # Each thread of a process has children of its own.
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += [int(child) for child in path.read_text().split()]

    return sorted(child for child in children if not _is_helper(child))


def _is_helper(pid: int) -> bool:
    try:
        command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True

    # A zombie has no command line.
    return not command or b"resource_tracker" in command


def _gunicorn(worker: str, *more: str) -> Kind:
    config = str(CONFIGURATIONS / f"gunicorn_{worker}.conf.py")

    def command(launch: Launch) -> list[str]:
        bind = f"127.0.0.1:{launch.port}"
        program = ["gunicorn", "--config", config, "--bind", bind, *more]
        return [*program, *launch.options, launch.app]

    sync = worker == "sync"
    needs = ("gunicorn", "gevent") if worker == "gevent" else ("gunicorn",)
    return Kind(
        command,
        needs,
        forks=True,
        # It puts a socket there, that of the newest server in place of others.
        environ=lambda launch: {"XDG_RUNTIME_DIR": str(launch.folder)},
        concurrent=not sync,
        keeps_alive=not sync,
    )


def _waitress(launch: Launch) -> list[str]:
    script = str(CONFIGURATIONS / "waitress_server.py")
    listen = f"--listen=127.0.0.1:{launch.port}"
    options = [listen, "--threads=8", *launch.options]
    return [sys.executable, script, *options, launch.app]


def _werkzeug(launch: Launch) -> list[str]:
    script = str(CONFIGURATIONS / "development.sh")
    options = ["--port", str(launch.port), *launch.options]
    return ["sh", script, launch.app, *options]


def _granian(launch: Launch) -> list[str]:
    script = str(CONFIGURATIONS / "granian.sh")
    options = ["--port", str(launch.port), *launch.options]
    return ["sh", script, *options, launch.app]


def _uvicorn(launch: Launch) -> list[str]:
    where = ["--app-dir", str(CONFIGURATIONS), "--port", str(launch.port)]
    return ["uvicorn", *where, *launch.options, "asgi:app"]


KINDS: dict[str, Kind] = {
    "gunicorn-sync": _gunicorn("sync"),
    "gunicorn-sync-preload": _gunicorn("sync", "--preload"),
    "gunicorn-gthread": _gunicorn("gthread"),
    "gunicorn-gthread-preload": _gunicorn("gthread", "--preload"),
    "gunicorn-gevent": _gunicorn("gevent"),
    "gunicorn-gevent-preload": _gunicorn("gevent", "--preload"),
    "waitress": Kind(_waitress, ("waitress",), ends_empty=False, ends_streams=False),
    "werkzeug": Kind(
        _werkzeug, ("flask",), forks=True, keeps_alive=False, graceful=False
    ),
    "granian": Kind(
        _granian, ("granian",), forks=True, ends_streams=False, holds_connection=False
    ),
    "a2wsgi-uvicorn": Kind(
        _uvicorn,
        ("a2wsgi", "uvicorn"),
        environ=lambda launch: {"WSGI_APP": launch.app},
        holds_connection=False,
    ),
}
