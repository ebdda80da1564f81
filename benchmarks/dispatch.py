"""Measure what a request pays for its tasks, in-process, next to the peers.

Each case is a number of tasks of one kind. All contenders are measured in the same
rounds; what is reported is the median, over the rounds, of what a request takes
longer than one of the bare app in the same round.
"""

from __future__ import annotations

import statistics
import time
import typing as t

from flask import current_app
from flask.globals import app_ctx

from . import contenders
from . import results
from . import timing

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .contenders import Work

COUNTS: t.Final = (1, 4, 8, 16, 64)
PEERS: t.Final = tuple(name for name in contenders.ALL if name != "idle")
MICROSECONDS: t.Final = 1e6

# What is behind Flask's proxies.
find_app: t.Final = current_app._get_current_object  # type: ignore[attr-defined]
find_context: t.Final = app_ctx._get_current_object  # type: ignore[attr-defined]


def measure(
    work: Work, count: int, names: cabc.Iterable[str], rounds: int, batch: float
) -> dict[str, t.Any]:
    """Measure *count* tasks of *work* for the contenders *names* and the bare app."""
    calls = {
        name: timing.request(contenders.build(name, work, count))
        for name in contenders.installed(names)
    }
    medians = timing.interleave(calls, rounds, batch)
    return {name: _summary(medians[name], medians["bare"]) for name in medians}


def verify(name: str) -> None:
    """Make sure that contender *name* gives what all of them have to give.

    :raises RuntimeError: A task was not done when the WSGI callable returned, or had
        no app context of its own.
    """
    done: list[tuple[object, object]] = []

    def work() -> None:
        time.sleep(timing.IO_SECONDS)
        done.append((find_app(), find_context()))

    app = contenders.build(name, work, 16)
    timing.request(app)()
    contexts = {id(context) for current, context in done if current is app}

    if not len(contexts) == len(done) == 16:
        raise RuntimeError(
            f"{contenders.ALL[name].label} ran {len(done)} of 16 tasks, in"
            f" {len(contexts)} app contexts of the app, before the request was over."
        )


def _summary(medians: list[float], bare: list[float]) -> dict[str, t.Any]:
    over = [
        (mine - other) * MICROSECONDS for mine, other in zip(medians, bare, strict=True)
    ]
    return {
        "request_us": round(statistics.median(medians) * MICROSECONDS, 2),
        "over_bare_us": round(statistics.median(over), 2),
        "over_bare_best_us": round((min(medians) - min(bare)) * MICROSECONDS, 2),
        "rounds_over_bare_us": [round(value, 2) for value in over],
    }


def cases(quick: bool) -> cabc.Iterator[tuple[str, Work, int]]:
    """Yield the kind of work, the work and the number of tasks of each case."""
    if quick:
        yield "no-op", timing.no_op, 1
        yield "no-op", timing.no_op, 16
        yield "5 ms of I/O", timing.wait_for_io, 8
        return

    works: dict[str, Work] = {
        "no-op": timing.no_op,
        "50 us of CPU": timing.cpu_work(),
        "5 ms of I/O": timing.wait_for_io,
    }

    for kind, work in works.items():
        for count in COUNTS:
            yield kind, work, count


def show(case: dict[str, t.Any]) -> None:
    """Print the table of one case."""
    ours = case["contenders"].get("apitask")
    rows = [
        (
            contenders.ALL[name].label,
            f"{figures['request_us']:,.1f}",
            f"{figures['over_bare_us']:,.1f}",
            f"{figures['over_bare_best_us']:,.1f}",
            f"{ours['over_bare_us'] / figures['over_bare_us']:.2f}"
            if ours and name != "bare"
            else "",
        )
        for name, figures in case["contenders"].items()
    ]
    header = ("us per request", "all", "over bare", "best over bare", "ours / it")
    print(
        f"\n{case['tasks']} x {case['work']}\n{results.table(header, rows)}", flush=True
    )


def main() -> None:
    """Measure, print and write all cases."""
    options = results.arguments(__doc__)

    for name in contenders.installed(("inline", *contenders.CONCURRENT)):
        verify(name)

    rounds, batch = (25, 0.005) if options.quick else (60, 0.005)
    measured = [
        {
            "work": "no-op",
            "tasks": 0,
            "contenders": measure(
                timing.no_op, 0, ("bare", "idle"), rounds * 5, batch / 2
            ),
        }
    ]
    show(measured[0])

    for kind, work, count in cases(options.quick):
        figures = measure(work, count, PEERS, rounds, batch)
        measured.append({"work": kind, "tasks": count, "contenders": figures})
        show(measured[-1])

    results.write(options.output, "dispatch", {"cases": measured})


if __name__ == "__main__":
    main()
