"""Draw the plot of what ``sizing.py`` measured."""

from __future__ import annotations

import typing as t

import matplotlib as mpl
from matplotlib.figure import Figure

from . import sizing

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito, https://jfly.uni-koeln.de/color/), by pool size.
COLOURS: t.Final = {
    1: "#999999",
    2: "#E69F00",
    4: "#56B4E9",
    8: "#009E73",
    16: "#D55E00",
}


def draw(path: pathlib.Path, result: dict[str, t.Any]) -> None:
    """Write the plot: who runs the tasks, and how long responses take."""
    free = sizing.rows_of(result["cases"], None)
    bound = sizing.rows_of(result["cases"], sizing.DEADLINE_SECONDS)
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    share, response, deadline = figure.subplots(1, 3)
    _draw(share, free, "by_pool")
    loads = [load / 100 for load in range(30, 211)]
    law = [sizing.predict(load) for load in loads]
    share.plot(loads, law, "k--", label="Little's law", lw=1)
    share.set_ylim(0, 1.05)
    share.set_ylabel("share of the tasks that the pool runs")
    share.set_title("no deadline", fontsize="medium")
    _draw_times(response, free)
    response.set_title("no deadline: the request helps", fontsize="medium")
    _draw_times(deadline, bound)
    seconds = sizing.DEADLINE_SECONDS
    title = f"APITASK_TIMEOUT = {seconds:g}: it does not help"
    deadline.set_title(title, fontsize="medium")
    handles, labels = share.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    # The same for the same figures.
    mpl.rcParams["svg.hashsalt"] = "flask-apitask"
    figure.savefig(path, metadata={"Date": None})


def _draw_times(axes: Axes, rows: cabc.Mapping[int, list[dict[str, t.Any]]]) -> None:
    _draw(axes, rows, "median_ms")
    _draw(axes, rows, "p95_ms", ":")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms to the response (dotted: 95th percentile)")


def _draw(
    axes: Axes,
    rows: cabc.Mapping[int, list[dict[str, t.Any]]],
    key: str,
    line: str = "-",
) -> None:
    for size, cases in rows.items():
        loads = [case["load"] for case in cases]
        values = [case[key] for case in cases]
        label = f"pool of {size}"
        axes.plot(loads, values, f"o{line}", color=COLOURS[size], label=label, ms=3)

    # Where the tasks need as many threads as there are.
    axes.axvline(1, color="black", lw=0.8, alpha=0.5)
    axes.set_xlabel("threads that the tasks need / APITASK_POOL_SIZE")
    axes.grid(alpha=0.3)
