"""Real brokers, each on a port and with a folder of its own, and workers of Celery."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te

# Seconds after which a broker that does not start or end has failed.
PATIENCE = 60.0
# Seconds that a worker has to end by itself.
_GRACE = 10.0
_HERE = pathlib.Path(__file__).parent
# Neither Linux nor macOS gives these to outgoing connections, by default.
_PORTS: t.Final = range(20_000, 30_000)
# Debian's program on the path changes the user, and with it the environment.
_SERVERS = sorted(
    pathlib.Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")
)


class Program:
    """A program that can be killed, stopped for a while, and started again.

    :param folder: For its data and its log.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Return what starts it."""
        raise NotImplementedError

    def environ(self) -> dict[str, str]:
        """Return the environment variables that it needs."""
        return {}

    def is_ready(self) -> bool:
        """Tell whether it is at work."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def output(self) -> str:
        """Return what it has written, each time that it ran."""
        return (self.folder / "log").read_text(errors="replace")

    def __enter__(self) -> te.Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, with what it has stored, and wait until it is at work."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={"PATH": os.environ.get("PATH", os.defpath), **self.environ()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        until = time.monotonic() + PATIENCE

        while not self.is_ready():
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to what it has started."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)

            self._process.wait(PATIENCE)
            self._process = None


class Broker(Program):
    """A broker."""

    # Part of the broker's URL, before and after its port.
    url_parts: t.ClassVar[tuple[str, str]]
    # Debian's package.
    package: t.ClassVar[str]

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.port = find_port()

    @staticmethod
    def is_installed() -> bool:
        """Tell whether there is the program."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        before, after = self.url_parts
        return f"{before}127.0.0.1:{self.port}{after}"

    def kill(self) -> None:
        super().kill()
        until = time.monotonic() + PATIENCE

        # What it has started itself may take a moment longer.
        while self.is_ready():
            assert time.monotonic() < until, "it is killed, and accepts"
            time.sleep(0.02)

    def answers(self, question: bytes, answer: bytes) -> bool:
        """Tell whether what it answers begins in a way."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                connection.sendall(question)
                return connection.recv(len(answer)) == answer
        except OSError:
            return False


class Redis(Broker):
    """A Redis that writes down each command before it answers."""

    url_parts = ("redis://", "/0")
    package = "redis-server"

    @staticmethod
    def is_installed() -> bool:
        return shutil.which("redis-server") is not None

    def command(self) -> list[str]:
        where = ["--bind", "127.0.0.1", "--port", str(self.port)]
        stored = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        return ["redis-server", *where, "--dir", str(self.folder), *stored]

    def is_ready(self) -> bool:
        """Tell whether it works: while it loads what it has stored, it answers no."""
        return self.answers(b"PING\r\n", b"+PONG")


class RabbitMQ(Broker):
    """A RabbitMQ with a port mapper of its own, which ends with it."""

    url_parts = ("amqp://guest:guest@", "//")
    package = "rabbitmq-server"

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self._epmd_port = find_port()
        self._dist_port = find_port()
        self._epmd: subprocess.Popen[bytes] | None = None

    @staticmethod
    def is_installed() -> bool:
        return bool(_SERVERS) and shutil.which("epmd") is not None

    def command(self) -> list[str]:
        return [str(_SERVERS[-1])]

    def environ(self) -> dict[str, str]:
        empty = self.folder / "empty"
        empty.touch()
        return {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "HOME": str(self.folder),
            "LC_ALL": "C.UTF-8",
            "RABBITMQ_CONF_ENV_FILE": str(empty),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(empty),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_MNESIA_BASE": str(self.folder),
            "RABBITMQ_NODENAME": f"apitask{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            # It waits for others with nothing to do, on all cores, by default.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }

    def is_ready(self) -> bool:
        """Tell whether it answers, which it does a moment after it accepts."""
        return self.answers(b"AMQP\0\0\x09\1", b"\1")

    def __enter__(self) -> te.Self:
        where = ["-address", "127.0.0.1", "-port", str(self._epmd_port)]
        self._epmd = subprocess.Popen(["epmd", *where])
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()

        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(PATIENCE)


class Road:
    """The way to a broker and back, on which the replies may trickle.

    :param trickle: Seconds between two bytes of a reply, once they trickle.
    """

    def __init__(self, broker: Broker, trickle: float) -> None:
        self._broker = broker
        self._trickle = trickle
        self.trickles = threading.Event()
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        """The broker's URL by way of this road."""
        before, after = self._broker.url_parts
        return f"{before}127.0.0.1:{self._listener.getsockname()[1]}{after}"

    def __enter__(self) -> te.Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

        for thread in self._threads:
            thread.join(PATIENCE)

        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._ended.is_set():
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._broker.port))
                self._sockets += near, far

                for way in ((near, far, False), (far, near, True)):
                    self._threads.append(threading.Thread(target=self._lead, args=way))
                    self._threads[-1].start()

    def _lead(self, source: socket.socket, goal: socket.socket, back: bool) -> None:
        with contextlib.suppress(OSError):
            while octets := source.recv(65_536):
                while back and self.trickles.is_set() and octets:
                    self._ended.wait(self._trickle)
                    goal.sendall(octets[:1])
                    octets = octets[1:]

                goal.sendall(octets)

            goal.shutdown(socket.SHUT_WR)


class Worker(Program):
    """A worker of Celery.

    :param celery_app: Where the Celery app is, as ``module:name``.
    :param pool: Of Celery: ``"prefork"`` or ``"threads"``.
    :param variables: Environment variables for it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        celery_app: str,
        pool: str,
        variables: cabc.Mapping[str, str],
    ) -> None:
        super().__init__(folder)
        self._celery_app = celery_app
        self._pool = pool
        self._variables = variables
        self._starts = 0

    def command(self) -> list[str]:
        self._starts += 1
        celery = [sys.executable, "-m", "celery", "-A", self._celery_app]
        quiet = ["--without-gossip", "--without-mingle", "--loglevel", "INFO"]
        # A broker tells its workers apart by their names.
        named = ["--hostname", f"{self.folder.name}@localhost"]
        return [*celery, "worker", "-P", self._pool, "-c", "2", *quiet, *named]

    def environ(self) -> dict[str, str]:
        paths = [str(_HERE), str(_HERE.parent)]
        # What coverage tells its children is among those that are inherited.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLASK_")}
        return {**inherited, "PYTHONPATH": os.pathsep.join(paths), **self._variables}

    def is_ready(self) -> bool:
        return self.output().count(" ready.") >= self._starts

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # It finishes what it has begun, unless its broker is gone.
            self._process.terminate()

            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)

        super().__exit__()


BROKERS: dict[str, type[Broker]] = {"redis": Redis, "rabbitmq": RabbitMQ}


@contextlib.contextmanager
def running(name: str) -> cabc.Iterator[Broker]:
    """Start a broker of a kind, for as long as a block takes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with BROKERS[name](pathlib.Path(folder)) as broker:
            yield broker


def find_port() -> int:
    """Return a port that is free, and stays so while a server is started once more."""
    while True:
        port = random.SystemRandom().choice(_PORTS)

        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
        ):
            return port
