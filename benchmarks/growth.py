"""Measure what grows: cost per task, and memory of a server."""

from __future__ import annotations

import gc
import statistics
import typing as t

import psutil

from . import contenders
from . import results
from . import timing
from .contenders import OURS

if t.TYPE_CHECKING:
    from .results import Result

COUNTS: t.Final = (100, 10_000)
REQUESTS: t.Final = 200_000
WARM_UP_REQUESTS: t.Final = 20_000
TASKS_PER_REQUEST: t.Final = 3
LIMITS: t.Final = contenders.Limits(per_request=8, per_process=32)


def resident_memory(requests: int, warm_up: int) -> Result:
    """Return by how many KiB a process grows while *requests* run three tasks each."""
    call = timing.request(
        contenders.build(OURS, timing.no_op, TASKS_PER_REQUEST, LIMITS)
    )
    process = psutil.Process()

    def resident_after(count: int) -> int:
        for _ in range(count):
            call()

        gc.collect()
        return int(process.memory_info().rss) // 1024

    before = resident_after(warm_up)
    return {"requests": requests, "growth_kib": resident_after(requests) - before}


def cost_per_task() -> dict[str, float]:
    """Return the microseconds per no-op task, by how many of them a request runs.

    All of them and their futures are alive at once, so that the garbage collector
    (should it be on) goes through more of them, the more there are.
    """
    calls = {
        str(count): timing.request(contenders.build(OURS, timing.no_op, count))
        for count in (0, *COUNTS)
    }
    medians = timing.interleave(calls, rounds=5, batch_seconds=0.02)
    none, *costs = (statistics.median(medians[name]) for name in calls)
    return {
        str(count): round((cost - none) / count * 1e6, 2)
        for count, cost in zip(COUNTS, costs, strict=True)
    }


def main() -> None:
    """Measure, print and write. Memory comes first, while the process is fresh."""
    options = results.arguments(__doc__)
    fraction = 10 if options.quick else 1
    measured = {
        "resident": resident_memory(REQUESTS // fraction, WARM_UP_REQUESTS // fraction),
        "cost_per_task_us": cost_per_task(),
    }
    gc.disable()
    measured["cost_without_gc_us"] = cost_per_task()
    gc.enable()
    print(results.dump(measured))
    results.write(options.output, "growth", measured)


if __name__ == "__main__":
    main()
