"""Write and print what was measured against the measures that the project set itself.

Fails only if something is off by more than a factor of two: the machine may be noisy.
"""

from __future__ import annotations

import json
import sys
import typing as t

from . import contenders
from . import results

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

OURS: t.Final = "apitask"
NOISE_FACTOR: t.Final = 2.0


class Measure(t.NamedTuple):
    """One figure that was measured, and the most that it should be."""

    label: str
    value: float
    most: float

    def is_far_off(self) -> bool:
        return self.value > self.most * NOISE_FACTOR


def read(folder: pathlib.Path, python: str) -> dict[str, dict[str, t.Any]]:
    """Read what the scripts wrote on one Python version, by the script's name."""
    return {
        name: json.loads(path.read_text())
        for name in ("dispatch", "load", "growth")
        if (path := folder / f"{name}-{python}.json").exists()
    }


def evaluate(measured: dict[str, dict[str, t.Any]]) -> list[Measure]:
    """Return the measures for which there are figures."""
    evaluators = {"dispatch": _dispatch, "load": _load, "growth": _growth}
    return [
        measure
        for name, result in measured.items()
        for measure in evaluators[name](result)
    ]


def show(measures: list[Measure]) -> str:
    """Lay the measures out as a table."""
    rows = [
        (
            measure.label,
            f"{measure.value:.2f}",
            f"{measure.most:g}",
            "met" if measure.value <= measure.most else "NOT MET",
        )
        for measure in measures
    ]
    return results.table(("measure", "is", "at most", ""), rows)


def _dispatch(result: dict[str, t.Any]) -> cabc.Iterator[Measure]:
    cases = {
        (case["work"], case["tasks"]): {
            name: figures["over_bare_us"]
            for name, figures in case["contenders"].items()
        }
        for case in result["cases"]
    }
    # Microseconds, not a ratio: taken when the machine did the least besides.
    idle = result["cases"][0]["contenders"]["idle"]["over_bare_best_us"]
    yield Measure("no task: us over the bare app", idle, 3.0)

    for tasks, limits in (
        (1, {"shared_pool": 0.25, "request_pool": 0.15, "flask_executor": 0.2}),
        (16, {"shared_pool": 0.8, "request_pool": 0.2, "flask_executor": 0.3}),
    ):
        over = cases["no-op", tasks]

        for name in [name for name in limits if name in over]:
            label = f"{tasks} no-op: ours / {contenders.ALL[name].label}"
            yield Measure(label, over[OURS] / over[name], limits[name])

    over = cases["5 ms of I/O", 8]
    best = min(_peers(over), key=over.__getitem__)
    label = f"8 x 5 ms: ours / {contenders.ALL[best].label}, the best peer"
    yield Measure(label, over[OURS] / over[best], 1.05)


def _load(result: dict[str, t.Any]) -> cabc.Iterator[Measure]:
    for case in result["cases"]:
        figures = case["contenders"]
        best = max(_peers(figures), key=lambda name: float(figures[name]["rps"]))
        ours, its = figures[OURS], figures[best]
        load = f"load of {case['connections']} connections"
        peer = f"{contenders.ALL[best].label}, the best peer"
        yield Measure(f"{load}: requests/s, {peer} / ours", its["rps"] / ours["rps"], 1)
        yield Measure(f"{load}: p99, ours / its", ours["p99_ms"] / its["p99_ms"], 1)


def _growth(result: dict[str, t.Any]) -> cabc.Iterator[Measure]:
    for key, note in (("cost_per_task_us", ""), ("cost_without_gc_us", ", no gc")):
        costs = dict(zip(result["counts"], result[key][OURS], strict=True))
        label = f"cost per task{note}: of 10,000 / of 100"
        yield Measure(label, costs[10_000] / costs[100], 1.5)

    resident = result["resident"]
    yield Measure(
        f"resident memory over {resident['requests'][-1]:,} requests: MiB",
        resident["growth_kib"] / 1024,
        1.0,
    )


def _peers(figures: cabc.Iterable[str]) -> list[str]:
    return [name for name in contenders.CONCURRENT if name in figures and name != OURS]


def main() -> None:
    """Tabulate everything in the output folder for this Python version."""
    options = results.arguments(__doc__)
    measures = evaluate(read(options.output, results.PYTHON))
    table = show(measures)
    options.output.joinpath(f"measures-{results.PYTHON}.txt").write_text(table + "\n")
    print(table)

    if any(measure.is_far_off() for measure in measures):
        sys.exit(f"A measure is off by more than a factor of {NOISE_FACTOR:g}.")


if __name__ == "__main__":
    main()
