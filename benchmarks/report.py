"""Write the tables and draw the plots that the documentation shows."""

from __future__ import annotations

import re
import typing as t

import matplotlib as mpl
from matplotlib.figure import Figure

from . import contenders
from . import dispatch
from . import mail
from . import results
from . import sizing
from .contenders import OURS
from .measures import PEERS

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from matplotlib.axes import Axes

    from .results import Result

NO_METADATA: t.Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# Colour-blind safe (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS: t.Final = {
    "inline": "#000000",
    "thread": "#E69F00",
    "request_pool": "#CC79A7",
    "shared_pool": "#0072B2",
    "flask_executor": "#F0E442",
    "trio": "#56B4E9",
    "no_keepalive": "#009E73",
    "inline_block": "#999999",
    "apitask_block": "#8B0000",
    OURS: "#D55E00",
}
POOL_COLOURS: t.Final = {1: "#999999", 2: "#E69F00", 4: "#56B4E9", 8: "#009E73"}
HEADLINE_CASES: t.Final = {
    (dispatch.NO_OP, 1): "one task that does nothing",
    (dispatch.NO_OP, 16): "16 tasks that do nothing",
    (dispatch.IO, 8): "8 tasks that wait 5 ms",
}


def draw_dispatch(measured: dict[str, Result]) -> Figure:
    """Draw what the peers cost a request, for each version of Python."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(HEADLINE_CASES), sharey=True)
    height = 0.8 / len(measured)

    for index, (python, result) in enumerate(measured.items()):
        cases = {(case["work"], case["tasks"]): case for case in result["cases"]}

        for axes, key in zip(panels, HEADLINE_CASES, strict=True):
            figures = cases[key]["contenders"]
            ours = figures[OURS]["over_bare_us"]
            bars = axes.barh(
                [place + index * height for place in range(len(PEERS))],
                [figures[name]["over_bare_us"] / ours for name in PEERS],
                height,
                color=("#56B4E9", "#0072B2")[index % 2],
                label=f"Python {python}",
            )
            axes.bar_label(bars, fmt="{:.3g}", padding=3)

    for axes, title in zip(panels, HEADLINE_CASES.values(), strict=True):
        axes.axvline(1, color=COLOURS[OURS], label=contenders.ALL[OURS].label)
        axes.margins(x=0.2)
        axes.set_title(title, fontsize="medium")

    ticks = [place + height * (len(measured) - 1) / 2 for place in range(len(PEERS))]
    panels[0].invert_yaxis()
    panels[0].set_yticks(ticks, [contenders.ALL[name].label for name in PEERS])
    figure.supxlabel("time over the bare app, as a multiple of that of Flask-ApiTask")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def draw_mail(result: Result) -> Figure:
    """Draw the time to the response by the number of mails, a panel per server."""
    panels: dict[str, list[Result]] = {}

    for case in result["cases"]:
        if not case["work_ms"] and case["mails"] != mail.MANY:
            title = f"{case['server']}, {case['rtt_ms']} ms away"
            panels.setdefault(title, []).append(case)

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]

    for axes, (title, cases) in zip(grid, panels.items(), strict=True):
        counts = [case["mails"] for case in cases]

        for name in cases[0]["median_ms"]:
            times = [case["median_ms"][name] for case in cases]
            label, width = mail.CONTENDERS[name].label, 2.5 if name == OURS else 1.2
            axes.plot(counts, times, "o-", c=COLOURS[name], label=label, lw=width, ms=4)

        axes.set(title=title, xscale="log", yscale="log", xlabel="mails of one request")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)

    ticks = [10, 30, 100, 300, 1_000, 3_000, 10_000]
    grid[0].set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    grid[0].set_ylabel("ms to the response")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_sizing(result: Result) -> Figure:
    """Draw how long responses take by the load, without a deadline and with one."""
    free = sizing.rows_of(result["cases"], None)
    bound = sizing.rows_of(result["cases"], sizing.DEADLINE_SECONDS)
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    _draw_loads(panels[0], free, "no deadline")
    _draw_loads(panels[1], bound, f"APITASK_TIMEOUT = {sizing.DEADLINE_SECONDS:g}")
    panels[0].set_ylabel("median response, ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_loads(axes: Axes, rows: cabc.Mapping[int, list[Result]], title: str) -> None:
    for size, cases in rows.items():
        loads = [case["load"] for case in cases]
        values = [case["median_ms"] for case in cases]
        colour = POOL_COLOURS.get(size, COLOURS[OURS])
        axes.plot(loads, values, "o-", c=colour, label=f"pool of {size}", ms=3)

    # Where the tasks need as many threads as there are.
    axes.axvline(1, color="black", lw=0.8, alpha=0.5)
    axes.set(title=title, xlabel="threads that the tasks need / APITASK_POOL_SIZE")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Write a plot, a line for each group of its elements."""
    # The same for the same figures, and letters that are letters.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flask-apitask"}):
        figure.savefig(path, metadata=NO_METADATA)

    text = re.sub(r"\s*\n\s*(?=\S)(?!<g id)", " ", path.read_text("utf-8"))
    path.write_text(re.sub(r"\n\s*", "\n", text).strip() + "\n", "utf-8")


def main() -> None:
    """Write what can be made of the figures in the output folder."""
    options = results.arguments(__doc__)
    folder: pathlib.Path = options.output
    pythons = {
        path.stem.partition("-")[2]: results.read(folder, path.stem.partition("-")[2])
        for path in sorted(folder.glob("dispatch-*.json"))
    }

    if pythons:
        measured = {python: found["dispatch"] for python, found in pythons.items()}
        save(draw_dispatch(measured), folder / "dispatch.svg")

    found = results.read(folder, results.PYTHON)

    for name, draw, tabulate in (
        ("mail", draw_mail, mail.report),
        ("sizing", draw_sizing, sizing.report),
    ):
        if name in found:
            stem = f"{name}-{results.PYTHON}"
            (folder / f"{stem}.txt").write_text(f"{tabulate(found[name])}\n")
            save(draw(found[name]), folder / f"{stem}.svg")


if __name__ == "__main__":
    main()
