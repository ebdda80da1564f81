from __future__ import annotations

import contextvars
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import typing as t

import pytest

if t.TYPE_CHECKING:
    from flask import Flask

    from benchmarks.contenders import Body
    from benchmarks.contenders import Work

ROOT: t.Final = pathlib.Path(__file__).parents[1]
FIGURES: t.Final = ROOT / "docs" / "benchmarks"
WAIT_SECONDS: t.Final = 120.0


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests import the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_published_measures_are_those_of_the_published_figures(python: str) -> None:
    """The table in the docs is what the figures beside it come to."""
    from benchmarks import measures
    from benchmarks import results

    table = measures.show(measures.evaluate(results.read(FIGURES, python)))
    assert (FIGURES / f"measures-{python}.txt").read_text() == table + "\n"


@pytest.mark.parametrize(
    "plot", sorted(FIGURES.glob("*.svg")), ids=lambda path: path.name
)
def test_published_plots_are_shown(plot: pathlib.Path) -> None:
    """No plot is kept that no page shows."""
    pages = FIGURES.parent.rglob("*.md")
    assert any(f"benchmarks/{plot.name}" in page.read_text("utf-8") for page in pages)


def test_figures_have_a_line_for_each_contender() -> None:
    """A refresh changes the lines of what has changed."""
    from benchmarks import results

    figures = {"cases": [{"tasks": 1, "contenders": {"a": {"x": 1}, "b": {"x": 2}}}]}
    text = results.dump(figures)
    assert json.loads(text) == figures
    assert [line.strip() for line in text.splitlines() if '"x"' in line] == [
        '"a": {"x": 1},',
        '"b": {"x": 2}',
    ]


@pytest.mark.parametrize(
    ("value", "at_least", "is_met", "is_nearly_met"),
    [
        (0.904, False, True, True),
        (0.906, False, False, True),
        (1.9, False, False, False),
        (0.896, True, True, True),
        (0.894, True, False, True),
        (0.4, True, False, False),
    ],
)
def test_a_measure_is_compared_as_it_is_shown(
    value: float, at_least: bool, is_met: bool, is_nearly_met: bool
) -> None:
    """A figure keeps its limit if the two decimals of the table do."""
    from benchmarks import measures

    measure = measures.Measure("", value, 0.9, at_least)
    assert measure.is_met() is is_met
    assert measure.is_met(measures.NOISE_FACTOR) is is_nearly_met


def test_a_peer_that_isolates_is_compared() -> None:
    """A thread per task is another thread, and has an app context of its own."""
    from benchmarks import contenders

    contenders.verify("thread")


def in_the_request_context(app: Flask, limits: object) -> Body:
    """Run each task in a thread that has the contexts of the request."""

    def body(work: Work, count: int) -> None:
        for _ in range(count):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=[work])
            thread.start()
            thread.join()

    return body


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inline", "8 of them on the request's own thread"),
        ("bare", "ran 0 of 8 tasks"),
        ("flawed", "in 1 app contexts"),
    ],
)
def test_a_peer_that_does_not_isolate_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """A contender has to give what ours gives, or its figures would be unfair."""
    from benchmarks import contenders

    flawed = contenders.Contender("flawed", in_the_request_context)
    monkeypatch.setitem(contenders.ALL, "flawed", flawed)

    with pytest.raises(RuntimeError, match=message):
        contenders.verify(name)


@pytest.mark.speed
def test_dispatch_costs_what_it_should(tmp_path: pathlib.Path) -> None:
    """No measure of the cost of dispatch is off by more than a factor of two."""
    for module in ("flask_executor", "trio"):
        if importlib.util.find_spec(module) is None:
            if os.environ.get("APITASK_REQUIRE_SERVICES"):
                pytest.fail(f"{module} is not installed, so ours has no peer.")

            pytest.skip(f"{module} is not installed")

    run_script("dispatch", tmp_path)
    table = run_script("measures", tmp_path)
    # No task; 1, 4 and 16 next to three peers, with I/O between requests or not; I/O.
    assert table.count("  met\n") + table.count("NOT MET") == 1 + 2 * 9 + 1, table


@pytest.mark.speed
def test_mail_takes_the_time_that_it_should(tmp_path: pathlib.Path) -> None:
    """No measure of the mail transport is off by more than a factor of two.

    Round trips and sockets are counted, not timed, so these are exact.
    """
    run_script("mail", tmp_path)
    table = run_script("measures", tmp_path)
    (path,) = tmp_path.glob("mail-*.json")
    result = json.loads(path.read_text())
    # One mail and three on two servers; the round trips on each; the sockets.
    rows = table.count("  met\n") + table.count("NOT MET")
    assert rows == 4 + len(result["round_trips"]) + 1, table
    assert result["round_trips"]["PIPELINING"]["apitask"] == 2
    assert result["round_trips"]["no PIPELINING"]["apitask"] == 4
    assert result["sockets"]["kept"] > 0
    assert result["sockets"]["after_keepalive"] == 0


def run_script(name: str, output: pathlib.Path) -> str:
    """Run a benchmark in a process of its own, which no coverage tool slows down."""
    environ = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("COVERAGE", "PYTEST"))
    }
    script = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--output", output],
        capture_output=True,
        cwd=ROOT,
        env=environ,
        text=True,
        timeout=WAIT_SECONDS,
    )
    assert script.returncode == 0, script.stdout + script.stderr
    return script.stdout
