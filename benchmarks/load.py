"""Measure requests per second and latency under gunicorn, next to the peers.

One gunicorn process with 16 threads per contender, on a free port of the loopback
interface. Its view runs two tasks of 5 ms of I/O. wrk (``apt-get install wrk``) keeps 4
connections busy, which leaves the process time to spare, then 16, which does not; a few
seconds for one contender after the other, in a new order in every repetition. Reported
is the median over the repetitions; of the processor time of a request, too, which tells
more than the rate where the load generator takes part of the processors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import typing as t
import urllib.request

import psutil

from . import contenders
from . import results
from . import timing

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

THREADS: t.Final = 16
CONNECTIONS: t.Final = (4, 16)
TASKS: t.Final = 2
LIMITS: t.Final = contenders.Limits(per_request=8, per_process=32)
START_SECONDS: t.Final = 30.0

# What wrk prints is for people; this hook is given the numbers themselves.
WRK_SCRIPT: t.Final = """
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\nJSON {"requests": %d, "duration": %d, "p50": %d, "p99": %d, "errors": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


def application(name: str) -> Flask:
    """Build the app of the contender *name*: the factory that gunicorn calls."""
    return contenders.build(name, timing.wait_for_io, TASKS, LIMITS)


class Server(t.NamedTuple):
    """A gunicorn that is up: where it listens, and its arbiter process."""

    url: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Return the processor time that the workers have used so far."""
        times = [child.cpu_times() for child in self.process.children()]
        return sum(time.user + time.system for time in times)


@contextlib.contextmanager
def server(name: str) -> cabc.Iterator[Server]:
    """Serve the contender *name* for the length of a ``with`` block."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "gunicorn",
                    f"{__spec__.name}:application({name!r})",
                ),
                *("--bind", f"fd://{listener.fileno()}", "--no-control-socket"),
                *("--worker-class", "gthread", "--workers", "1"),
                *("--threads", str(THREADS), "--log-level", "warning"),
            ],
            pass_fds=[listener.fileno()],
        )

    try:
        _wait_until_served(url)
        yield Server(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def load(
    server: Server, connections: int, seconds: int, script: pathlib.Path
) -> dict[str, float]:
    """Put load on a server, and return the rate, latencies and processor time."""
    cpu_before = server.cpu_seconds()
    finished = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"-s{script}", server.url],
        capture_output=True,
        check=True,
        text=True,
        timeout=seconds + START_SECONDS,
    )
    counts = json.loads(finished.stdout.rpartition("JSON ")[2])

    if counts["errors"]:
        raise RuntimeError(f"Of the requests to {server.url}, some failed: {counts!r}.")

    return {
        "rps": counts["requests"] / counts["duration"] * 1e6,
        "p50_ms": counts["p50"] / 1e3,
        "p99_ms": counts["p99"] / 1e3,
        "cpu_us": (server.cpu_seconds() - cpu_before) / counts["requests"] * 1e6,
    }


def measure(repetitions: int, seconds: int) -> list[dict[str, t.Any]]:
    """Measure all contenders, interleaved; return the medians by connections."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        script = pathlib.Path(folder, "done.lua")
        script.write_text(WRK_SCRIPT)
        servers = {
            name: stack.enter_context(server(name))
            for name in contenders.installed(contenders.ALL)
        }

        for each in servers.values():
            load(each, THREADS, 1, script)

        return [
            {
                "connections": connections,
                "contenders": _repeat(
                    repetitions,
                    {
                        name: functools.partial(
                            load, each, connections, seconds, script
                        )
                        for name, each in servers.items()
                    },
                ),
            }
            for connections in CONNECTIONS
        ]


def _repeat(
    repetitions: int, loads: dict[str, cabc.Callable[[], dict[str, float]]]
) -> dict[str, dict[str, float]]:
    """Put each of the loads, in a new order in every repetition."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    order = list(loads)
    shuffle = random.Random(0).shuffle

    for _ in range(repetitions):
        shuffle(order)

        for name in order:
            samples[name].append(loads[name]())

    return {name: _medians(samples[name]) for name in loads}


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: round(statistics.median(sample[key] for sample in samples), 2)
        for key in samples[0]
    }


def _wait_until_served(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS

    while True:
        try:
            with urllib.request.urlopen(url, timeout=START_SECONDS):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise

            time.sleep(0.05)


def show(connections: int, measured: dict[str, dict[str, float]]) -> None:
    """Print the table of one number of connections."""
    rows = [
        (
            contenders.ALL[name].label,
            f"{figures['rps']:,.0f}",
            f"{figures['p50_ms']:.1f}",
            f"{figures['p99_ms']:.1f}",
            f"{figures['cpu_us']:.0f}",
        )
        for name, figures in measured.items()
    ]
    title = f"{TASKS} x 5 ms of I/O, {connections} connections"
    header = (title, "requests/s", "p50 ms", "p99 ms", "CPU us")
    print("\n" + results.table(header, rows))


def main() -> None:
    """Measure, print and write."""
    options = results.arguments(__doc__)

    if shutil.which("wrk") is None:
        sys.exit("wrk, the load generator, was not found. Try: apt-get install wrk")

    repetitions, seconds = (2, 1) if options.quick else (15, 2)
    cases = measure(repetitions, seconds)

    for case in cases:
        show(case["connections"], case["contenders"])

    results.write(options.output, "load", {"tasks": TASKS, "cases": cases})


if __name__ == "__main__":
    main()
