"""Draw the plot of what ``mail.py`` measured."""

from __future__ import annotations

import typing as t

import matplotlib as mpl
from matplotlib.figure import Figure

from . import mail
from . import report

if t.TYPE_CHECKING:
    import pathlib

    from matplotlib.axes import Axes

COLOURS: t.Final = report.COLOURS | {"no_keepalive": "#009E73"}


def draw(path: pathlib.Path, result: dict[str, t.Any]) -> None:
    """Write the plot: a panel per place of the server, and one for many mails."""
    panels: dict[str, list[dict[str, t.Any]]] = {}

    for case in result["cases"]:
        title = f"{case['server']}\n{case['rtt_ms']} ms away"
        title += f", {case['work_ms']} ms of work" if case["work_ms"] else ""
        panels.setdefault(title, []).append(case)

    figure = Figure(figsize=(14, 8), layout="constrained")
    columns = (len(panels) + 3) // 2
    halves = figure.add_gridspec(2, 1)
    # Each with margins of its own.
    rows = [figure.add_subfigure(halves[row]) for row in (0, 1)]
    grids = [row.add_gridspec(1, columns) for row in rows]

    for index, (title, cases) in enumerate(panels.items()):
        row, column = divmod(index, columns)
        axes = rows[row].add_subplot(grids[row][column])
        _draw_times(axes, cases)
        axes.set_title(title, fontsize="medium")

    handles, labels = figure.axes[0].get_legend_handles_labels()
    rows[1].legend(handles, labels, loc="outside lower center", ncols=6)
    # What is left of the second row, as the names take room.
    _draw_rates(
        rows[1].add_subplot(grids[1][len(panels) - columns :]),
        result["throughput"]["per_second"],
        f"{result['throughput']['mails']} mails of one request\n5 ms away",
    )
    # The same for the same figures.
    mpl.rcParams["svg.hashsalt"] = "flask-apitask"
    figure.savefig(path, metadata={"Date": None})


def _draw_times(axes: Axes, cases: list[dict[str, t.Any]]) -> None:
    counts = [case["mails"] for case in cases]

    for name in cases[0]["contenders"]:
        times = [case["contenders"][name]["median_ms"] for case in cases]
        label = mail.CONTENDERS[name].label
        width = 2.5 if name == mail.OURS else 1.2
        axes.plot(counts, times, "o-", color=COLOURS[name], label=label, lw=width, ms=4)

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    ticks = [10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    times = [figure["median_ms"] for case in cases for figure in _figures(case)]
    axes.set_ylim(min(times) / 1.3, max(times) * 1.3)
    axes.set_xlabel("mails of one request")
    axes.set_ylabel("ms to the response")
    axes.grid(alpha=0.3)


def _figures(case: dict[str, t.Any]) -> list[dict[str, t.Any]]:
    return list(case["contenders"].values())


def _draw_rates(axes: Axes, rates: dict[str, float], title: str) -> None:
    names = list(reversed(rates))
    bars = axes.barh(
        [(mail.CONTENDERS | mail.BLOCKS)[name].label for name in names],
        [rates[name] for name in names],
        color=[COLOURS[name.removesuffix("_block")] for name in names],
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.2)
    axes.set_xlabel("messages per second")
    axes.set_title(title, fontsize="medium")
