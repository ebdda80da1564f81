from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
import typing as t

import pytest

ROOT: t.Final = pathlib.Path(__file__).parents[1]
FIGURES: t.Final = ROOT / "docs" / "benchmarks"
WAIT_SECONDS: t.Final = 120.0


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_published_measures_are_those_of_the_published_figures(
    monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    """The table in the docs is what the figures beside it come to."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import measures

    table = measures.show(measures.evaluate(measures.read(FIGURES, python)))
    assert (FIGURES / f"measures-{python}.txt").read_text() == table + "\n"


@pytest.mark.parametrize(
    "plot", sorted(FIGURES.glob("*.svg")), ids=lambda path: path.name
)
def test_published_plots_are_shown(plot: pathlib.Path) -> None:
    """No plot is kept that no page shows."""
    pages = FIGURES.parent.rglob("*.md")
    assert any(f"benchmarks/{plot.name}" in page.read_text("utf-8") for page in pages)


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
    assert table.count("at most") == 1
    assert table.count("met") + table.count("NOT MET") == 8, table


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
