"""Measure what grows: cost per task, memory of a scope and of a server, threads."""

from __future__ import annotations

import concurrent.futures
import gc
import statistics
import threading
import tracemalloc
import typing as t

import psutil
from flask import Flask

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run

from . import contenders
from . import results
from . import timing

COUNTS: t.Final = (10, 100, 1_000, 10_000, 100_000)
REQUESTS: t.Final = 200_000
WARM_UP_REQUESTS: t.Final = 20_000
TASKS_PER_REQUEST: t.Final = 3
QUEUED: t.Final = 1_000
BURST_REQUESTS: t.Final = 16
BURST_TASKS: t.Final = 16
LIMITS: t.Final = contenders.Limits(per_request=8, per_process=32)
WAIT_SECONDS: t.Final = 30.0
COSTS: t.Final = {
    "cost_per_task_us": "",
    "cost_without_gc_us": ", garbage collector off",
}


def resident_memory(requests: int, warm_up: int) -> dict[str, t.Any]:
    """Sample the resident KiB while *requests* run three tasks each."""
    call = timing.request(
        contenders.build("apitask", timing.no_op, TASKS_PER_REQUEST, LIMITS)
    )
    process = psutil.Process()

    def resident_after(count: int) -> int:
        for _ in range(count):
            call()

        gc.collect()
        return int(process.memory_info().rss) // 1024

    resident_after(warm_up)
    step = requests // 20
    first = resident_after(0)
    samples = [first, *(resident_after(step) for _ in range(20))]
    return {
        "requests": [step * index for index in range(len(samples))],
        "resident_kib": samples,
        "growth_kib": samples[-1] - first,
    }


def cost_per_task(counts: t.Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Return the microseconds per no-op task when a request runs that many.

    All of them and their futures are alive at once, so that the garbage collector
    (should it be on) goes through more of them, the more there are.
    """
    costs = {}

    for name in contenders.installed(("shared_pool", "apitask")):
        calls = {
            str(count): timing.request(contenders.build(name, timing.no_op, count))
            for count in counts
        }
        calls["bare"] = timing.request(contenders.build("bare", timing.no_op, 0))
        medians = timing.interleave(calls, rounds, batch_seconds=0.02)
        bare = statistics.median(medians["bare"])
        costs[name] = [
            round((statistics.median(medians[str(count)]) - bare) / count * 1e6, 2)
            for count in counts
        ]

    return costs


def scope_memory() -> dict[str, int]:
    """Return the bytes of an open scope, of a queued task, and what an end leaves."""
    app = Flask("benchmarks")
    ApiTask(app)
    release = threading.Event()

    def traced() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    def fill_a_scope() -> tuple[int, int]:
        with open_scope():
            empty = traced()

            for _ in range(QUEUED):
                run(release.wait, WAIT_SECONDS)

            filled = traced()
            release.set()

        release.clear()
        return empty, filled

    with app.app_context():
        fill_a_scope()
        tracemalloc.start()
        before = traced()
        empty, filled = fill_a_scope()
        after = traced()
        tracemalloc.stop()

    return {
        "scope_bytes": empty - before,
        "queued_task_bytes": (filled - empty) // QUEUED,
        "left_bytes": after - before,
    }


def idle_threads() -> dict[str, int]:
    """Return how many threads are there after a burst of concurrent requests."""
    threads = {}

    for name in contenders.installed(contenders.CONCURRENT):
        before = set(threading.enumerate())
        call = timing.request(
            contenders.build(name, timing.wait_for_io, BURST_TASKS, LIMITS)
        )

        with concurrent.futures.ThreadPoolExecutor(BURST_REQUESTS) as clients:
            for request in [clients.submit(call) for _ in range(BURST_REQUESTS)]:
                request.result(WAIT_SECONDS)

        threads[name] = len(set(threading.enumerate()) - before)

    return threads


def show(measured: dict[str, t.Any]) -> None:
    """Print all tables."""
    rows = [
        (contenders.ALL[name].label + note, *(f"{cost:.1f}" for cost in costs))
        for key, note in COSTS.items()
        for name, costs in measured[key].items()
    ]
    print(results.table(("us per task", *map(str, measured["counts"])), rows))
    sizes = [(key, f"{size:,}") for key, size in measured["memory"].items()]
    print("\n" + results.table(("memory", "bytes"), sizes))
    resident = measured["resident"]
    print(
        f"\nresident memory over {resident['requests'][-1]:,} requests:"
        f" {resident['growth_kib']:+,} KiB"
    )
    threads = [
        (contenders.ALL[name].label, str(count))
        for name, count in measured["idle_threads"].items()
    ]
    print("\n" + results.table(("after a burst", "idle threads"), threads))


def main() -> None:
    """Measure, print and write. Memory comes first, while the process is fresh."""
    options = results.arguments(__doc__)
    fraction = 10 if options.quick else 1
    counts = COUNTS[1:4] if options.quick else COUNTS
    measured = {
        "resident": resident_memory(REQUESTS // fraction, WARM_UP_REQUESTS // fraction),
        "memory": scope_memory(),
        "idle_threads": idle_threads(),
        "counts": counts,
        "cost_per_task_us": cost_per_task(counts, rounds=5),
    }
    gc.disable()
    measured["cost_without_gc_us"] = cost_per_task(counts, rounds=5)
    gc.enable()
    show(measured)
    results.write(options.output, "growth", measured)


if __name__ == "__main__":
    main()
