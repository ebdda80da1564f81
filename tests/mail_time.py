"""A clock and servers for tests of timeouts, however busy the machine is."""

from __future__ import annotations

import contextlib
import select
import sys
import threading
import time
import typing as t

from smtp_servers import PATIENCE

from flask_apitask.mail import stream

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import pytest
    from smtp_servers import ScriptedServer


class Clock:
    """The clock of the modules that send: it moves when they sleep or a test says so.

    Sockets, locks and dates still use the real one.
    """

    time = staticmethod(time.time)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = time.monotonic()
        self.slept: list[float] = []
        self.asked = threading.Event()

        for name, module in list(sys.modules.items()):
            if name.startswith("flask_apitask.mail.") and hasattr(module, "time"):
                monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        """Return the time."""
        now = self._now
        # As soon as this is set, a test may let time pass.
        self.asked.set()
        return now

    def sleep(self, seconds: float) -> None:
        """Move the clock on, without waiting."""
        self.slept.append(seconds)
        self.pass_by(seconds)

    def pass_by(self, seconds: float) -> None:
        """Move the clock on."""
        self._now += seconds


@contextlib.contextmanager
def unhurried(server: ScriptedServer | None = None) -> cabc.Iterator[list[float]]:
    """Let a server take its time for each reply, but don't wait for a silent one.

    A wait ends as soon as the server plays :attr:`Fault.SILENCE`, as if it had timed
    out. The list has the timeouts of these waits.
    """
    in_vain: list[float] = []
    read_line = stream.SMTPStream._read_line

    def read(self: stream.SMTPStream, deadline: float) -> bytes:
        began = stream.time.monotonic()  # type: ignore[attr-defined]
        until = time.monotonic() + PATIENCE

        while not (self._received or _has_answered(self.sock)):
            if server is not None and self.sock.getsockname() in server.silent_to:
                in_vain.append(deadline - began)
                return read_line(self, 0.0)

            assert time.monotonic() < until, "the server is silent"

        return read_line(self, began + PATIENCE)

    stream.SMTPStream._read_line = read  # type: ignore[method-assign]

    try:
        yield in_vain
    finally:
        stream.SMTPStream._read_line = read_line  # type: ignore[method-assign]


def _has_answered(sock: t.Any) -> bool:
    pending = getattr(sock, "pending", int)
    return bool(pending() or select.select([sock], [], [], 0.01)[0])
