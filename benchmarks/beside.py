"""Servers beside the process that measures, which end with it, whatever ends it."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import subprocess
import sys
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

ROOT: t.Final = pathlib.Path(__file__).parents[1]
HOST: t.Final = "127.0.0.1"
END_SECONDS: t.Final = 10.0


@contextlib.contextmanager
def listening(module: str, *arguments: str) -> cabc.Iterator[int]:
    """Run a module of the benchmarks as a server; give the port at which it listens.

    The module is given the number of its listening socket before the other arguments.
    A client that connects before the server is up waits in the socket's backlog.
    """
    with socket.create_server((HOST, 0), backlog=1024) as listener:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(listener.fileno()), *arguments],
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
        )

        try:
            yield listener.getsockname()[1]
        finally:
            child.communicate(timeout=END_SECONDS)


def wait_for_end() -> None:
    """Block until the process that measures is done with this one, or gone."""
    sys.stdin.read()
