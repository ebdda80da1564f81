"""Measure what becomes of responses when the pool has more to do than it can.

Requests come at a given rate, at random moments, whether those before are answered or
not. Each starts two tasks that wait, and works meanwhile. By Little's law their tasks
keep ``rate * tasks * seconds`` threads busy: measured is what happens below and above
as many threads as the pool has.
"""

from __future__ import annotations

import concurrent.futures
import gc
import importlib.util
import random
import statistics
import sys
import time
import typing as t

from flask import Flask

from flask_apitask import ApiTask
from flask_apitask import run
from flask_apitask import task_finished

from . import measures
from . import results
from . import timing

if t.TYPE_CHECKING:
    import collections.abc as cabc

TASKS: t.Final = 2
TASK_SECONDS: t.Final = 0.02
# So a request whose tasks begin at once has not to wait for them.
VIEW_SECONDS: t.Final = TASK_SECONDS
SIZES: t.Final = (1, 2, 4, 8, 16)
DEADLINE_SIZES: t.Final = (4, 8)
DEADLINE_SECONDS: t.Final = 5 * TASK_SECONDS
# Threads that the tasks need, over those of the pool.
LOADS: t.Final = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0)
DEADLINE_LOADS: t.Final = (0.4, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0)
QUICK_SIZES: t.Final = (4,)
QUICK_LOADS: t.Final = (0.4, 2.0)
# More than ever serve a request at once: they are not what is measured.
SERVER_THREADS: t.Final = 128
CASE_SECONDS: t.Final = 0.5
CASE_REQUESTS: t.Final = 20
SEED: t.Final = 20
# Of the share of the tasks that the pool runs, from what Little's law says.
MOST_DIFFERENCE: t.Final = 0.1
# Threads from which on it says so. The tasks of a request come all at once, and fewer
# threads are late for some of them, however much they idle otherwise.
LEAST_SIZE: t.Final = 2 * TASKS


class Case(t.NamedTuple):
    """What is offered to which pool.

    :param size: Threads of the pool.
    :param deadline: Seconds, if any.
    :param load: Threads that the tasks need, over those of the pool.
    """

    size: int
    deadline: float | None
    load: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.load * self.size / (TASKS * TASK_SECONDS)


class Site:
    """An app whose requests start tasks that wait, and the books about them."""

    def __init__(self, size: int, deadline: float | None) -> None:
        app = Flask(__name__)
        app.config.update(APITASK_POOL_SIZE=size, APITASK_TIMEOUT=deadline)
        # A task that is cancelled is an ERROR, and there are to be many.
        app.logger.disabled = True
        ApiTask(app)
        app.add_url_rule("/", view_func=self._view)
        task_finished.connect(self._note, app)
        self._call = timing.request(app)
        self._tasks: list[concurrent.futures.Future[None]] = []
        self._ran: list[str] = []
        self._seconds: list[float] = []

    def offer(self, case: Case, dice: random.Random) -> dict[str, t.Any]:
        """Send requests at the rate of a case, and return what came of them."""
        count = max(CASE_REQUESTS, round(case.rate * CASE_SECONDS))
        seconds = count / case.rate
        # That many at moments of no pattern are what a Poisson process makes of them.
        moments = sorted(dice.uniform(0, seconds) for _ in range(count))
        self._tasks.clear()
        self._ran.clear()
        self._seconds.clear()
        # A full collection stops everybody for longer than a task takes.
        gc.collect()

        with concurrent.futures.ThreadPoolExecutor(SERVER_THREADS) as server:
            began = time.perf_counter()

            for moment in moments:
                time.sleep(max(0, began + moment - time.perf_counter()))
                server.submit(self._serve, began + moment)

        # Those that are overdue go on, and nothing of them shall be in the next case.
        concurrent.futures.wait(task for task in self._tasks if not task.cancelled())
        return self._figures(case, count)

    def warm_up(self, case: Case) -> None:
        """Have the pool start its threads."""
        self.offer(case._replace(load=2.0), random.Random(SEED))

    def _view(self) -> str:
        for _ in range(TASKS):
            self._tasks.append(run(time.sleep, TASK_SECONDS))

        time.sleep(VIEW_SECONDS)
        return ""

    def _note(self, sender: Flask, how: str, **extra: object) -> None:
        self._ran.append(how)

    def _serve(self, moment: float) -> None:
        self._call()
        # Since it should have come, not since there was a thread to serve it.
        self._seconds.append(time.perf_counter() - moment)

    def _figures(self, case: Case, requests: int) -> dict[str, t.Any]:
        if len(self._seconds) != requests:
            raise RuntimeError(f"{requests - len(self._seconds)} requests failed.")

        percentiles = statistics.quantiles(self._seconds, n=20, method="inclusive")
        cancelled = sum(task.cancelled() for task in self._tasks)
        return {
            **case._asdict(),
            "rate": round(case.rate, 2),
            "requests": requests,
            "median_ms": round(statistics.median(self._seconds) * 1e3, 2),
            "p95_ms": round(percentiles[-1] * 1e3, 2),
            "by_pool": round(self._ran.count("thread") / len(self._tasks), 3),
            "cancelled": round(cancelled / len(self._tasks), 3),
        }


def predict(load: float) -> float:
    """Return the share of the tasks that a pool can run, by Little's law."""
    return min(1.0, 1 / load)


def measure(
    deadline: float | None, sizes: cabc.Iterable[int], loads: cabc.Iterable[float]
) -> cabc.Iterator[dict[str, t.Any]]:
    """Offer each load to a pool of each size."""
    dice = random.Random(SEED)

    for size in sizes:
        site = Site(size, deadline)
        site.warm_up(Case(size, deadline, 1.0))

        for load in loads:
            yield site.offer(Case(size, deadline, load), dice)


def evaluate(result: dict[str, t.Any]) -> list[measures.Measure]:
    """Return how far the pools are from what Little's law says, without a deadline."""
    differences: dict[int, list[float]] = {}

    for case in result["cases"]:
        if case["deadline"] is None and case["size"] >= LEAST_SIZE:
            difference = abs(case["by_pool"] - predict(case["load"]))
            differences.setdefault(case["size"], []).append(difference)

    label = "pool of {}: share of the tasks, from that of Little's law"
    return [
        measures.Measure(label.format(size), statistics.mean(found), MOST_DIFFERENCE)
        for size, found in differences.items()
    ]


def rows_of(
    cases: cabc.Iterable[dict[str, t.Any]], deadline: float | None
) -> dict[int, list[dict[str, t.Any]]]:
    """Return the cases with a deadline, or without, by the size of the pool."""
    rows: dict[int, list[dict[str, t.Any]]] = {}

    for case in cases:
        if case["deadline"] == deadline:
            rows.setdefault(case["size"], []).append(case)

    return rows


def report(result: dict[str, t.Any]) -> str:
    """Lay out what was measured, a table for each figure, and the measures."""
    free = rows_of(result["cases"], None)
    bound = rows_of(result["cases"], DEADLINE_SECONDS)
    limit = f"a deadline of {DEADLINE_SECONDS:g} s"
    figures = [
        ("requests/s by threads needed / pool size", free, "rate", "{:.0f}"),
        ("share of the tasks run by the pool", free, "by_pool", "{:.2f}"),
        ("median response, ms", free, "median_ms", "{:.0f}"),
        ("95th percentile, ms", free, "p95_ms", "{:.0f}"),
        (f"median response, {limit}, ms", bound, "median_ms", "{:.0f}"),
        (f"share of the tasks cancelled, {limit}", bound, "cancelled", "{:.2f}"),
    ]
    tables = []

    for head, rows, key, form in figures:
        loads = [case["load"] for case in next(iter(rows.values()))]
        lines = [
            (f"pool of {size}", *(form.format(case[key]) for case in cases))
            for size, cases in rows.items()
        ]

        if key == "by_pool":
            law = ("by Little's law", *(form.format(predict(load)) for load in loads))
            lines.insert(0, law)

        tables.append(results.table((head, *(f"{load:g}" for load in loads)), lines))

    return "\n\n".join([*tables, measures.show(evaluate(result))])


def main() -> None:
    """Measure, print, write and draw."""
    options = results.arguments(__doc__)
    quick = (QUICK_SIZES, QUICK_LOADS)
    free = quick if options.quick else (SIZES, LOADS)
    bound = quick if options.quick else (DEADLINE_SIZES, DEADLINE_LOADS)
    result = {
        "tasks": TASKS,
        "task_seconds": TASK_SECONDS,
        "view_seconds": VIEW_SECONDS,
        "cases": [
            *measure(None, *free),
            *measure(DEADLINE_SECONDS, *bound),
        ],
    }
    text = report(result)
    print(text)
    results.write(options.output, "sizing", result)
    (options.output / f"sizing-{results.PYTHON}.txt").write_text(f"{text}\n")

    if importlib.util.find_spec("matplotlib"):
        from . import sizing_plot

        sizing_plot.draw(options.output / f"sizing-{results.PYTHON}.svg", result)

    if any(measure.is_far_off() for measure in evaluate(result)):
        sys.exit(f"A measure is off by more than a factor of {measures.NOISE_FACTOR}.")


if __name__ == "__main__":
    main()
