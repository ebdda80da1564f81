"""An event that reaches into other processes."""

from __future__ import annotations

import contextlib
import socket
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Seconds after which who does not come has failed to.
PATIENCE = 20.0


class Gate:
    """Hold all that connect until the test lets them pass.

    Who comes sends a line with a name, and is through as soon as it can read.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(PATIENCE)
        self.port: int = self._listener.getsockname()[1]

    def close(self) -> None:
        """Let all pass that wait, and those that come."""
        self._listener.close()

    @contextlib.contextmanager
    def hold(self, *names: str) -> cabc.Iterator[Held]:
        """Wait until all of these are here. They pass after the block at the latest."""
        held: dict[str, socket.socket] = {}

        with contextlib.ExitStack() as stack:
            while set(held) != set(names):
                visitor, _ = self._listener.accept()
                stack.enter_context(visitor)
                visitor.settimeout(PATIENCE)

                with visitor.makefile(encoding="utf-8") as lines:
                    name = lines.readline().strip()

                # Others are left from a test that failed, and may go.
                if name in names:
                    held[name] = visitor
                else:
                    visitor.close()

            yield Held(held)


class Held:
    """The names of those held at a gate."""

    def __init__(self, visitors: dict[str, socket.socket]) -> None:
        self._visitors = visitors

    def let_pass(self, name: str) -> None:
        """Let one of them pass."""
        self._visitors[name].sendall(b"\n")
