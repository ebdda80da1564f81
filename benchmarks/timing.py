"""Work to run, requests without a network, and rounds that drift hits alike."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import gc
import random
import socket
import statistics
import subprocess
import time
import typing as t

from werkzeug.test import create_environ

if t.TYPE_CHECKING:
    from flask import Flask

IO_SECONDS: t.Final = 5e-3

Call: t.TypeAlias = cabc.Callable[[], None]


def no_op() -> None:
    """Do nothing: what is measured is the dispatch alone."""


def wait_for_io() -> None:
    """Stand for a round trip to a server: it waits and holds no lock."""
    time.sleep(IO_SECONDS)


@contextlib.contextmanager
def round_trip() -> cabc.Iterator[Call]:
    """Give a call that sends a byte to another process and waits for its return.

    A server reads a request and writes a response between two views. Meanwhile the
    interpreter is free, and threads that have nothing to do fall asleep. A hot loop of
    requests has no such moment.
    """
    ours, theirs = socket.socketpair()

    def call() -> None:
        ours.sendall(b".")
        ours.recv(1)

    # It ends when our end is closed, which happens before it is waited for.
    with subprocess.Popen(["cat"], stdin=theirs.fileno(), stdout=theirs.fileno()), ours:
        theirs.close()
        yield call


def request(app: Flask) -> Call:
    """Return a call that takes one ``GET /`` through *app* as a WSGI server does."""
    environ = create_environ("/")

    def start_response(
        status: str, headers: t.Any, exc_info: t.Any = None
    ) -> cabc.Callable[[bytes], object]:
        if status != "200 OK":
            raise RuntimeError(f"The view of a contender answered {status!r}.")

        return lambda chunk: None

    def call() -> None:
        body = app(environ.copy(), start_response)

        for _ in body:
            pass

        body.close()  # type: ignore[attr-defined]

    return call


def interleave(
    calls: cabc.Mapping[str, Call],
    rounds: int,
    batch_seconds: float,
    between: Call = no_op,
) -> dict[str, list[float]]:
    """Return the median seconds of a call in each of *rounds*, for each of *calls*.

    Every round takes all calls in a new order, a batch of each, so that whatever
    else the machine does hits all of them alike. The collector is left on, as a
    server leaves it: the garbage that a contender makes is part of its price.

    :param batch_seconds: how long a batch takes, about; at least three calls.
    :param between: what happens before each call, and is not measured.
    """
    sizes = {name: _batch_size(call, batch_seconds) for name, call in calls.items()}
    medians: dict[str, list[float]] = {name: [] for name in calls}

    for name in take_turns(calls, rounds):
        call = calls[name]
        call()
        durations = []

        for _ in range(sizes[name]):
            between()
            durations.append(seconds(call))

        medians[name].append(statistics.median(durations))

    return medians


def take_turns(names: cabc.Iterable[str], rounds: int) -> cabc.Iterator[str]:
    """Yield all *names* in each round, in a new order, and collect the garbage."""
    order = list(names)
    shuffle = random.Random(0).shuffle

    for _ in range(rounds):
        shuffle(order)

        for name in order:
            gc.collect()
            yield name


def seconds(call: Call) -> float:
    """Return how long *call* takes."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e9


def _batch_size(call: Call, batch_seconds: float) -> int:
    """Warm *call* up and return how many of it make a batch."""
    once = statistics.median(seconds(call) for _ in range(3))
    return max(3, min(500, round(batch_seconds / once)))
