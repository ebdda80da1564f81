from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import threading
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import types

    import typing_extensions as te

# Seconds after which a program that does not start, answer or end has failed.
PATIENCE = 30.0


class ChildProcess:
    """A program that serves until it is ended, and what it writes.

    :param environ: Environment variables for it. Those named ``FLASK_*`` that the tests
        themselves have would change what an app does, and are left out.
    """

    def __init__(
        self, command: list[str], environ: cabc.Mapping[str, str] | None = None
    ) -> None:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("FLASK_")
        }
        # A shell's background jobs ignore SIGINT, and so would what they start.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            self._process = subprocess.Popen(
                command,
                env={**inherited, "PYTHONUNBUFFERED": "1", **(environ or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
        finally:
            signal.signal(signal.SIGINT, handler)

        self.output = ""
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> te.Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: types.TracebackType | None,
    ) -> None:
        try:
            self.interrupt()
        finally:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._reader.join(PATIENCE)

    def expect(self, pattern: str) -> str:
        """Wait for output that a pattern matches, and return the pattern's group."""
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            match = re.search(pattern, line)

            if match is not None:
                return match[1]

        raise AssertionError(f"It ended without {pattern!r}, but with:\n{self.output}")

    def interrupt(self, times: int = 1) -> int:
        """End it as Ctrl-C does, pressed so often, and return its exit code."""
        for _ in range(times):
            self._process.send_signal(signal.SIGINT)

        return self.wait()

    def wait(self) -> int:
        """Wait for its end, and return its exit code."""
        code = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def _read(self) -> None:
        assert self._process.stdout is not None

        with self._process.stdout as stdout:
            for line in stdout:
                self.output += line
                self._lines.put(line)

        self._lines.put(None)
