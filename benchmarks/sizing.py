"""Measure what becomes of responses when the pool has more to do than it can.

Requests come at a given rate, at random moments, whether those before are answered or
not. Each starts two tasks that wait, and works meanwhile. By Little's law their tasks
keep ``rate * tasks * seconds`` threads busy: measured is what happens below and above
as many threads as the pool has.
"""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import random
import statistics
import threading
import time
import typing as t

from flask import Flask

from flask_apitask import ApiTask
from flask_apitask import run

from . import results
from . import timing

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .results import Result

TASKS: t.Final = 2
TASK_SECONDS: t.Final = 0.02
# So a request whose tasks begin at once does not have to wait for them.
VIEW_SECONDS: t.Final = TASK_SECONDS
DEADLINE_SECONDS: t.Final = 5 * TASK_SECONDS
# Threads of the pool, and threads that the tasks need over those of the pool.
SIZES: t.Final = (1, 2, 4, 8, 16)
LOADS: t.Final = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0)
DEADLINE_SIZES: t.Final = (4, 8)
DEADLINE_LOADS: t.Final = (0.4, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0)
QUICK: t.Final = ((4,), (0.4, 2.0))
# More than ever serve a request at once: they are not what is measured.
SERVER_THREADS: t.Final = 128
CASE_SECONDS: t.Final = 0.5
CASE_REQUESTS: t.Final = 20
SEED: t.Final = 20


class Site:
    """An app whose requests start tasks that wait, and the books about them.

    :param size: threads of the pool.
    :param deadline: seconds, if any.
    """

    def __init__(self, size: int, deadline: float | None) -> None:
        app = Flask(__name__)
        app.config.update(APITASK_POOL_SIZE=size, APITASK_TIMEOUT=deadline)
        # A task that is cancelled is an ERROR, and there are to be many.
        app.logger.disabled = True
        ApiTask(app)
        app.add_url_rule("/", view_func=self._view)
        self._size = size
        self._deadline = deadline
        self._call = timing.request(app)
        self._lock = threading.Lock()
        self._tasks: list[concurrent.futures.Future[None]] = []
        self._seconds: list[float] = []
        self._running = self._most = 0

    def offer(self, load: float, dice: random.Random) -> Result:
        """Send requests at the rate that makes that load, and say what came of them."""
        rate = load * self._size / (TASKS * TASK_SECONDS)
        count = max(CASE_REQUESTS, round(rate * CASE_SECONDS))
        # That many at moments of no pattern are what a Poisson process makes of them.
        moments = sorted(dice.uniform(0, count / rate) for _ in range(count))
        self._tasks.clear()
        self._seconds.clear()
        self._most = 0
        # A full collection stops everybody for longer than a task takes.
        gc.collect()

        with concurrent.futures.ThreadPoolExecutor(SERVER_THREADS) as server:
            began = time.perf_counter()

            for moment in moments:
                time.sleep(max(0, began + moment - time.perf_counter()))
                server.submit(self._serve, began + moment)

        # Those that are overdue go on, and nothing of them shall be in the next case.
        concurrent.futures.wait(task for task in self._tasks if not task.cancelled())

        if len(self._seconds) != count:
            raise RuntimeError(f"{count - len(self._seconds)} requests failed.")

        cancelled = sum(task.cancelled() for task in self._tasks)
        percentiles = statistics.quantiles(self._seconds, n=20, method="inclusive")
        return {
            "size": self._size,
            "deadline": self._deadline,
            "load": load,
            "rate": round(rate, 2),
            "requests": count,
            "median_ms": round(statistics.median(self._seconds) * 1e3, 2),
            "p95_ms": round(percentiles[-1] * 1e3, 2),
            "most_at_once": self._most,
            "cancelled": round(cancelled / len(self._tasks), 3),
        }

    def _view(self) -> str:
        for _ in range(TASKS):
            self._tasks.append(run(self._work))

        time.sleep(VIEW_SECONDS)
        return ""

    def _work(self) -> None:
        with self._lock:
            self._running += 1
            self._most = max(self._most, self._running)

        time.sleep(TASK_SECONDS)

        with self._lock:
            self._running -= 1

    def _serve(self, moment: float) -> None:
        self._call()
        # Since it should have come, not since there was a thread to serve it.
        self._seconds.append(time.perf_counter() - moment)


def measure(
    deadline: float | None, sizes: cabc.Iterable[int], loads: cabc.Sequence[float]
) -> cabc.Iterator[Result]:
    """Offer each load to a pool of each size."""
    dice = random.Random(SEED)

    for size in sizes:
        site = Site(size, deadline)
        # It starts its threads.
        site.offer(2.0, random.Random(SEED))

        for load in loads:
            yield site.offer(load, dice)


def rows_of(
    cases: cabc.Iterable[Result], deadline: float | None
) -> dict[int, list[Result]]:
    """Return the cases with a deadline, or without, by the size of the pool."""
    found = [case for case in cases if case["deadline"] == deadline]
    groups = itertools.groupby(found, lambda case: case["size"])
    return {size: list(group) for size, group in groups}


def report(result: Result) -> str:
    """Lay out what was measured, a table for each figure."""
    free = rows_of(result["cases"], None)
    bound = rows_of(result["cases"], DEADLINE_SECONDS)
    limit = f"a deadline of {DEADLINE_SECONDS:g} s"
    tables = []

    for head, rows, key, form in (
        ("requests/s by threads needed / pool size", free, "rate", "{:.0f}"),
        ("median response, ms", free, "median_ms", "{:.0f}"),
        ("95th percentile, ms", free, "p95_ms", "{:.0f}"),
        ("most tasks at once", free, "most_at_once", "{}"),
        (f"median response, {limit}, ms", bound, "median_ms", "{:.0f}"),
        (f"share of the tasks cancelled, {limit}", bound, "cancelled", "{:.2f}"),
    ):
        loads = [f"{case['load']:g}" for case in next(iter(rows.values()))]
        lines = [
            (f"pool of {size}", *(form.format(case[key]) for case in cases))
            for size, cases in rows.items()
        ]
        tables.append(results.table((head, *loads), lines))

    return "\n\n".join(tables)


def main() -> None:
    """Measure, print and write."""
    options = results.arguments(__doc__)
    free = QUICK if options.quick else (SIZES, LOADS)
    bound = QUICK if options.quick else (DEADLINE_SIZES, DEADLINE_LOADS)
    result = {
        "tasks": TASKS,
        "task_seconds": TASK_SECONDS,
        "view_seconds": VIEW_SECONDS,
        "cases": [*measure(None, *free), *measure(DEADLINE_SECONDS, *bound)],
    }
    print(report(result))
    results.write(options.output, "sizing", result)


if __name__ == "__main__":
    main()
