"""Measure what a request pays to hand tasks over to Celery, at brokers that run.

Give their URLs: ``python -m benchmarks.handover redis://localhost amqp://localhost``.
No worker runs what is published, and it is purged at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
import typing as t

from celery import Celery
from flask import Flask

from flask_apitask import ApiTask
from flask_apitask import run
from flask_apitask import task

from . import timing

if t.TYPE_CHECKING:
    import collections.abc as cabc

COUNTS: t.Final = (1, 4, 16)
# What the view does while its tasks are on their way.
WORK: t.Final = {"nothing": timing.no_op, "5 ms of I/O": timing.wait_for_io}
MILLISECONDS: t.Final = 1e3
# Requests of one way, before it is the turn of another.
TURN: t.Final = 20


@task("handover.routed")
def routed(number: int) -> None:
    """Go to Celery."""


@task("thread.task")
def threaded(number: int) -> None:
    """Stay on a thread."""


def make_celery(url: str, confirm: bool) -> Celery:
    """Make a Celery app as Flask's documentation does, without results."""
    celery_app = Celery("handover", broker=url, set_as_current=False)
    celery_app.conf.task_ignore_result = True
    celery_app.conf.task_default_queue = "flask-apitask-benchmark"

    if confirm:
        celery_app.conf.broker_transport_options = {"confirm_publish": True}

    return celery_app


def make_apps(url: str, count: int, work: timing.Call) -> dict[str, Flask]:
    """Make an app for each way to start tasks."""

    def delay(confirm: bool) -> cabc.Callable[[int], object]:
        celery_app = make_celery(url, confirm)
        plain = celery_app.task(name="handover.plain")(routed)
        return lambda number: plain.delay(number)

    ways: dict[str, cabc.Callable[[int], object]] = {
        "run(), threads": lambda number: run(threaded, number),
        "delay()": delay(False),
        "delay(), confirmed": delay(True),
        "run(), Celery": lambda number: run(routed, number),
    }
    return {name: make_app(url, way, count, work) for name, way in ways.items()}


def make_app(
    url: str, start: cabc.Callable[[int], object], count: int, work: timing.Call
) -> Flask:
    """Make an app whose view starts tasks, and does something itself."""
    app = Flask(__name__)
    app.config["APITASK_ROUTES"] = {"handover.*": "celery"}
    ApiTask(app)
    app.extensions["celery"] = make_celery(url, False)

    @app.get("/")
    def view() -> str:
        for number in range(count):
            start(number)

        work()
        return "done"

    return app


class Measured(t.NamedTuple):
    """What the requests of one way took, in seconds."""

    # Each request.
    durations: list[float]
    # The mean of each turn: of the CPU, in this process alone.
    cpu: list[float]


def measure(apps: dict[str, Flask], rounds: int) -> dict[str, Measured]:
    """Return how long each request took: the same number of each, in turns."""
    calls = {name: timing.request(app) for name, app in apps.items()}
    measured = {name: Measured([], []) for name in calls}

    for name in timing.take_turns(calls, rounds):
        calls[name]()
        began = time.process_time()
        durations = [timing.seconds(calls[name]) for _ in range(TURN)]
        measured[name].cpu.append((time.process_time() - began) / TURN)
        measured[name].durations.extend(durations)

    return measured


def main() -> None:
    """Measure and print all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("broker", nargs="+", help="its URL")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    head = ["broker", "the view does", "tasks", "", "p50 ms", "p99 ms", "CPU ms"]
    print(f"| {' | '.join([*head, 'p50 to confirmed `delay()`'])} |")
    print("|---|---|--:|---|--:|--:|--:|--:|")

    for url in options.broker:
        for doing, work in WORK.items():
            for count in COUNTS:
                measured = measure(make_apps(url, count, work), options.rounds)
                print_case(url, doing, count, measured)

        with make_celery(url, False) as celery_app:
            # Without a pause, RabbitMQ may not have counted the last ones.
            time.sleep(1)
            celery_app.control.purge()


def print_case(url: str, doing: str, count: int, measured: dict[str, Measured]) -> None:
    """Print a row for each way."""
    # The one that waits for the broker, too.
    plain = statistics.median(measured["delay(), confirmed"].durations)

    for name, (durations, cpu) in measured.items():
        median = statistics.median(durations)
        slow = statistics.quantiles(durations, n=100)[98]
        cells = [
            url.partition(":")[0],
            doing,
            str(count),
            name,
            f"{median * MILLISECONDS:.2f}",
            f"{slow * MILLISECONDS:.2f}",
            f"{statistics.median(cpu) * MILLISECONDS:.2f}",
            f"{median / plain:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
