"""Write and print what was measured against the measures that the project set itself.

Fails only if something is off by more than a factor of two: the machine may be noisy.
"""

from __future__ import annotations

import statistics
import sys
import typing as t

from . import contenders
from . import dispatch
from . import results
from .contenders import OURS

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .results import Result

NOISE_FACTOR: t.Final = 2.0
PEERS: t.Final = [name for name in contenders.HEADLINE if name != OURS]
# Ours over each other, by the number of tasks that do nothing.
DISPATCH: t.Final = {
    "shared_pool": {1: 1.0, 4: 0.9, 16: 0.8},
    "request_pool": {1: 0.5, 4: 0.4, 16: 0.3},
    "flask_executor": {1: 0.5, 4: 0.4, 16: 0.3},
}
# By server: one mail over that of a thread, its round trips, and three mails over
# those of Flask-Mail.
MAIL: t.Final = {
    "no PIPELINING": (0.35, 4, 0.12),
    "PIPELINING": (0.18, 2, 0.06),
    "Postfix": (0.19, 2, 0.06),
}


class Measure(t.NamedTuple):
    """One figure that was measured, and the most that it should be, or the least.

    It is compared as it is shown, with two decimals.
    """

    label: str
    value: float
    limit: float
    at_least: bool = False

    def is_met(self, factor: float = 1.0) -> bool:
        """Return whether the limit is kept, or is not off by more than *factor*."""
        if self.at_least:
            return round(self.value, 2) >= self.limit / factor

        return round(self.value, 2) <= self.limit * factor


def evaluate(measured: dict[str, Result]) -> list[Measure]:
    """Return the measures for which there are figures."""
    return [
        measure
        for name, result in measured.items()
        for measure in EVALUATORS[name](result)
    ]


def show(measures: list[Measure]) -> str:
    """Lay the measures out as a table."""
    rows = [
        (
            measure.label,
            f"{measure.value:.2f}",
            f"at {'least' if measure.at_least else 'most'} {measure.limit:g}",
            "met" if measure.is_met() else "NOT MET",
        )
        for measure in measures
    ]
    return results.table(("measure", "is", "should be", ""), rows)


def _dispatch(result: Result) -> cabc.Iterator[Measure]:
    cases = {
        (case["work"], case["tasks"]): {
            name: figures["over_bare_us"]
            for name, figures in case["contenders"].items()
        }
        for case in result["cases"]
    }
    over = cases[dispatch.NO_OP, 0]
    yield Measure("no task: ours / two empty hooks", over["idle"] / over["hooks"], 2.0)

    for work in (dispatch.NO_OP, dispatch.NO_OP_AFTER_IO):
        for name, limits in DISPATCH.items():
            for tasks, limit in limits.items():
                over = cases[work, tasks]
                label = f"{tasks} x {work}: ours / {contenders.ALL[name].label}"
                yield Measure(label, over[OURS] / over[name], limit)

    over = cases[dispatch.IO, 8]
    best = min(PEERS, key=over.__getitem__)
    label = f"8 x {dispatch.IO}: ours / {contenders.ALL[best].label}, the best peer"
    yield Measure(label, over[OURS] / over[best], 1.02)


def _load(result: Result) -> cabc.Iterator[Measure]:
    for case in result["cases"]:
        figures = case["contenders"]
        best = max(PEERS, key=lambda name: float(figures[name]["rps"]))
        ours, its = figures[OURS], figures[best]
        load = f"load of {case['connections']} connections"
        peer = f"{contenders.ALL[best].label}, the best peer"
        requests = f"{load}: requests/s, ours / {peer}"
        yield Measure(requests, ours["rps"] / its["rps"], 0.97, at_least=True)
        yield Measure(f"{load}: p99, ours / its", ours["p99_ms"] / its["p99_ms"], 1.03)


def _growth(result: Result) -> cabc.Iterator[Measure]:
    for key, note in (("cost_per_task_us", ""), ("cost_without_gc_us", ", no gc")):
        label = f"cost per task{note}: of 10,000 / of 100"
        yield Measure(label, result[key]["10000"] / result[key]["100"], 1.5)

    resident = result["resident"]
    label = f"resident memory over {resident['requests']:,} requests: MiB"
    yield Measure(label, resident["growth_kib"] / 1024, 1.0)
    newsletter = result["newsletter"]
    label = f"newsletter of {newsletter['messages']} MiB: peak of memory / rendered"
    yield Measure(label, newsletter["peak_bytes"] / newsletter["rendered_bytes"], 1.3)


def _mail(result: Result) -> cabc.Iterator[Measure]:
    for case in result["cases"]:
        if (case["rtt_ms"], case["work_ms"]) != (20, 0):
            continue

        medians, server = case["median_ms"], case["server"]
        one, _, three = MAIL[server]

        if case["mails"] == 1:
            label = f"one mail, {server}: ours / Thread per mail"
            yield Measure(label, medians[OURS] / medians["thread"], one)
        elif case["mails"] == 3:
            label = f"three mails, {server}: ours / Flask-Mail"
            yield Measure(label, medians[OURS] / medians["inline"], three)

    for server, counts in result["round_trips"].items():
        yield Measure(f"one mail, {server}: round trips", counts[OURS], MAIL[server][1])

    left = result["sockets"]["after_keepalive"]
    yield Measure("sockets left open after the keepalive", left, 0)


def _sizing(result: Result) -> cabc.Iterator[Measure]:
    """Say how long responses take while the pool suffices, and when it does not."""
    view, task = result["view_seconds"] * 1e3, result["task_seconds"] * 1e3
    free = [case for case in result["cases"] if case["deadline"] is None]
    # The tasks of a request come all at once: fewer threads are late for some of them.
    large = [case for case in free if case["size"] >= 2 * result["tasks"]]
    calm = [case["median_ms"] / view for case in large if case["load"] <= 0.6]
    serial = view + result["tasks"] * task
    busy = [case["median_ms"] / serial for case in free if case["load"] == 2.0]
    label = "0.6 of the pool needed: median response / the view"
    yield Measure(label, statistics.mean(calm), 1.25)
    label = "twice the pool needed: median response / one task after the other"
    yield Measure(label, statistics.mean(busy), 1.1)


EVALUATORS: t.Final[dict[str, cabc.Callable[[Result], cabc.Iterator[Measure]]]] = {
    "dispatch": _dispatch,
    "load": _load,
    "growth": _growth,
    "mail": _mail,
    "sizing": _sizing,
}


def main() -> None:
    """Tabulate everything in the output folder for this Python version."""
    options = results.arguments(__doc__)
    measures = evaluate(results.read(options.output, results.PYTHON))
    table = show(measures)
    options.output.joinpath(f"measures-{results.PYTHON}.txt").write_text(table + "\n")
    print(table)

    if not all(measure.is_met(NOISE_FACTOR) for measure in measures):
        sys.exit(f"A measure is off by more than a factor of {NOISE_FACTOR:g}.")


if __name__ == "__main__":
    main()
