"""Measure requests per second and latency under gunicorn, next to the peers.

One gunicorn process with 16 threads per contender, on a free port of the loopback
interface. Its view runs two tasks of 5 ms of I/O. wrk (``apt-get install wrk``) keeps 4
connections busy, which leaves the process time to spare, then 16, which does not: one
contender after the other, in a new order in every run. Reported is the mean over the
runs. The processor time of a request tells more than the rate where the load generator
takes part of the processors.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import typing as t
import urllib.request

import psutil

from . import beside
from . import contenders
from . import results
from . import timing

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from .results import Result

THREADS: t.Final = 16
CONNECTIONS: t.Final = (4, 16)
TASKS: t.Final = 2
GUNICORN_OPTIONS: t.Final = (
    f"--worker-class gthread --workers 1 --threads {THREADS}"
    " --no-control-socket --log-level warning"
)
LIMITS: t.Final = contenders.Limits(per_request=8, per_process=32)
# For six contenders, that makes six minutes.
RUNS: t.Final = 5
RUN_SECONDS: t.Final = 6
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
    with socket.create_server((beside.HOST, 0), backlog=128) as listener:
        url = f"http://{beside.HOST}:{listener.getsockname()[1]}/"
        command = f"gunicorn --bind fd://{listener.fileno()} {GUNICORN_OPTIONS}"
        factory = f"{__spec__.name}:application({name!r})"
        process = subprocess.Popen(
            [sys.executable, "-m", *command.split(), factory],
            pass_fds=[listener.fileno()],
        )

    try:
        # It waits in the backlog of the socket until the server is up.
        urllib.request.urlopen(url, timeout=START_SECONDS).close()
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


def measure(runs: int, seconds: int) -> cabc.Iterator[Result]:
    """Measure all contenders, interleaved; yield the means for each load."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        script = pathlib.Path(folder, "done.lua")
        script.write_text(WRK_SCRIPT)
        servers = {
            name: stack.enter_context(server(name)) for name in contenders.HEADLINE
        }

        for each in servers.values():
            load(each, THREADS, 1, script)

        for connections in CONNECTIONS:
            samples: dict[str, list[dict[str, float]]] = {name: [] for name in servers}

            for name in timing.take_turns(servers, runs):
                samples[name].append(load(servers[name], connections, seconds, script))

            means = {name: _mean(found) for name, found in samples.items()}
            yield {"connections": connections, "contenders": means}


def _mean(samples: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: round(statistics.mean(sample[key] for sample in samples), 2)
        for key in samples[0]
    }


def main() -> None:
    """Measure, print and write."""
    options = results.arguments(__doc__)

    if shutil.which("wrk") is None:
        sys.exit("wrk, the load generator, was not found. Try: apt-get install wrk")

    runs, seconds = (1, 1) if options.quick else (RUNS, RUN_SECONDS)
    cases = list(measure(runs, seconds))
    print(results.dump(cases))
    results.write(options.output, "load", {"tasks": TASKS, "cases": cases})


if __name__ == "__main__":
    main()
