"""Real brokers, each on a port and with a folder of its own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import typing_extensions as te

# Seconds after which a broker that does not start or end has failed.
PATIENCE = 60.0
# Debian's program on the path changes the user, and with it the environment.
_SERVERS = sorted(
    pathlib.Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")
)


class Broker:
    """A broker that can be killed, stopped for a while, and started again.

    :param folder: For its data and its log.
    """

    # Part of the broker's URL, before and after its port.
    url_parts: t.ClassVar[tuple[str, str]]

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.port = find_port()
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def is_installed() -> bool:
        """Tell whether there is the program."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """Return what starts it."""
        raise NotImplementedError

    def environ(self) -> dict[str, str]:
        """Return the environment variables that it needs."""
        return {}

    @property
    def url(self) -> str:
        before, after = self.url_parts
        return f"{before}127.0.0.1:{self.port}{after}"

    def __enter__(self) -> te.Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, with what it has stored, and wait until it listens."""
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

        while not self._accepts():
            output = (self.folder / "log").read_text(errors="replace")
            assert self._process.poll() is None, output
            assert time.monotonic() < until, output
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to what it has started."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)

            self._process.wait(PATIENCE)
            self._process = None
            until = time.monotonic() + PATIENCE

            # What it has started itself may take a moment longer.
            while self._accepts():
                assert time.monotonic() < until, "it is killed, and accepts"
                time.sleep(0.02)

    def _accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        except OSError:
            return False

        return True


class Redis(Broker):
    """A Redis that writes down each command before it answers."""

    url_parts = ("redis://", "/0")

    @staticmethod
    def is_installed() -> bool:
        return shutil.which("redis-server") is not None

    def command(self) -> list[str]:
        where = ["--bind", "127.0.0.1", "--port", str(self.port)]
        stored = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        return ["redis-server", *where, "--dir", str(self.folder), *stored]


class RabbitMQ(Broker):
    """A RabbitMQ with a port mapper of its own, which ends with it."""

    url_parts = ("amqp://guest:guest@", "//")

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

    def __enter__(self) -> te.Self:
        where = ["-address", "127.0.0.1", "-port", str(self._epmd_port)]
        self._epmd = subprocess.Popen(["epmd", *where])
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()

        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(PATIENCE)


BROKERS: dict[str, type[Broker]] = {"redis": Redis, "rabbitmq": RabbitMQ}


@contextlib.contextmanager
def running(name: str) -> cabc.Iterator[Broker]:
    """Start a broker of a kind, for as long as a block takes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with BROKERS[name](pathlib.Path(folder)) as broker:
            yield broker


def find_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
