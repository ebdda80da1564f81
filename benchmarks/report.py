"""Draw the plots of what was measured."""

from __future__ import annotations

import typing as t

import matplotlib as mpl
from matplotlib.figure import Figure

from . import contenders
from . import measures
from . import results

if t.TYPE_CHECKING:
    import pathlib

    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS: t.Final = {
    "bare": "#999999",
    "idle": "#999999",
    "inline": "#000000",
    "thread": "#E69F00",
    "request_pool": "#CC79A7",
    "shared_pool": "#0072B2",
    "flask_executor": "#F0E442",
    "trio": "#56B4E9",
    "apitask": "#D55E00",
}


def draw_dispatch(axes: Axes, case: list[dict[str, t.Any]], work: str) -> None:
    """Draw what a request pays over the bare app, by its number of tasks."""
    counts = [entry["tasks"] for entry in case]

    for name in case[0]["contenders"]:
        if name == "bare":
            continue

        over = [entry["contenders"][name]["over_bare_us"] for entry in case]
        label = contenders.ALL[name].label
        width = 2.5 if name == measures.OURS else 1.2
        axes.plot(counts, over, "o-", color=COLOURS[name], label=label, lw=width, ms=4)

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel(f"tasks of one request, each {work}")
    axes.set_ylabel("microseconds over the bare app")
    axes.grid(alpha=0.3)


def dispatch_figure(result: dict[str, t.Any]) -> Figure:
    """Draw one plot per kind of work."""
    by_work: dict[str, list[dict[str, t.Any]]] = {}

    for case in result["cases"]:
        if case["tasks"]:
            by_work.setdefault(case["work"], []).append(case)

    figure = Figure(figsize=(5 * len(by_work), 5), layout="constrained")

    for index, (work, case) in enumerate(by_work.items(), 1):
        draw_dispatch(figure.add_subplot(1, len(by_work), index), case, work)

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def load_figure(result: dict[str, t.Any]) -> Figure:
    """Draw requests per second and latency under load."""
    cases = result["cases"]
    figure = Figure(figsize=(11, 4 * len(cases)), layout="constrained")

    rows = figure.subplots(len(cases), 2, sharey=True)

    for row, case in zip(rows, cases, strict=True):
        connections = f"{case['connections']} connections"
        draw_load(row[0], case["contenders"], "rps", f"requests/s, {connections}")
        draw_load(row[1], case["contenders"], "p99_ms", f"p99 in ms, {connections}")

    return figure


def draw_load(
    axes: Axes, measured: dict[str, dict[str, float]], key: str, label: str
) -> None:
    """Draw one figure of all contenders as bars."""
    names = [name for name in reversed(measured) if name not in ("bare", "idle")]
    bars = axes.barh(
        [contenders.ALL[name].label for name in names],
        [measured[name][key] for name in names],
        color=[COLOURS[name] for name in names],
    )
    axes.bar_label(bars, fmt="{:,.0f}" if key == "rps" else "{:.1f}", padding=3)
    axes.margins(x=0.15)
    axes.set_xlabel(label)


def growth_figure(result: dict[str, t.Any]) -> Figure:
    """Draw the cost per task by their number, and the memory by that of requests."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    cost, memory = figure.subplots(1, 2)

    for key, line, note in (
        ("cost_per_task_us", "o-", ""),
        ("cost_without_gc_us", "o:", ", garbage collector off"),
    ):
        for name, costs in result[key].items():
            label = contenders.ALL[name].label + note
            cost.plot(result["counts"], costs, line, color=COLOURS[name], label=label)

    cost.set_xscale("log")
    cost.set_ylim(bottom=0)
    cost.set_xlabel("tasks in one scope")
    cost.set_ylabel("microseconds per no-op task")
    cost.legend()
    resident = result["resident"]
    first = resident["resident_kib"][0]
    memory.plot(
        resident["requests"],
        [kib - first for kib in resident["resident_kib"]],
        color=COLOURS[measures.OURS],
    )
    memory.axhline(1024, color="black", linestyle=":", label="the measure: 1 MiB")
    memory.set_ylim(bottom=min(0, *(kib - first for kib in resident["resident_kib"])))
    memory.set_xlabel("requests with three tasks each, after warm-up")
    memory.set_ylabel("growth of resident memory, KiB")
    memory.legend()
    return figure


FIGURES: t.Final = {
    "dispatch": dispatch_figure,
    "load": load_figure,
    "growth": growth_figure,
}


def draw(folder: pathlib.Path, measured: dict[str, dict[str, t.Any]]) -> None:
    """Write ``NAME-PYTHON.svg`` for each result; the same for the same figures."""
    mpl.rcParams["svg.hashsalt"] = "flask-apitask"

    for name, result in measured.items():
        figure = FIGURES[name](result)
        figure.suptitle(
            f"Python {result['python']}, Flask {result['packages']['flask']}"
        )
        python = result["python"].rpartition(".")[0]
        figure.savefig(folder / f"{name}-{python}.svg", metadata={"Date": None})


def main() -> None:
    """Draw everything in the output folder that this Python version measured."""
    options = results.arguments(__doc__)
    draw(options.output, measures.read(options.output, results.PYTHON))


if __name__ == "__main__":
    main()
