"""Processes beside the one that measures, which end with it, whatever ends it."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import socket

ROOT: t.Final = pathlib.Path(__file__).parents[1]
END_SECONDS: t.Final = 10.0


@contextlib.contextmanager
def process(
    module: str, listener: socket.socket, *arguments: str
) -> cabc.Iterator[None]:
    """Run a module of the benchmarks for the length of a ``with`` block.

    It is given the number of its listening socket before the other arguments. Who
    connects before it is up waits in the socket's backlog, so nobody has to wait here.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module, str(listener.fileno()), *arguments],
        cwd=ROOT,
        pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE,
    )

    try:
        yield
    finally:
        child.communicate(timeout=END_SECONDS)


def wait_for_end() -> None:
    """Block until the process that measures is done with this one, or gone."""
    sys.stdin.read()
