"""What the benchmark scripts have in common: arguments, JSON files, tables."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

PACKAGES: t.Final = ("flask", "werkzeug", "flask-executor", "trio", "gunicorn")
PYTHON: t.Final = f"{sys.version_info.major}.{sys.version_info.minor}"


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the arguments that every script takes: ``--quick`` and ``--output``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a short run with fewer cases, for continuous integration",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("docs", "benchmarks"),
        help="the folder for the JSON file (default: %(default)s)",
    )
    return parser.parse_args()


def write(output: pathlib.Path, name: str, result: dict[str, t.Any]) -> None:
    """Write *result* and what it was measured on to ``NAME-PYTHON.json``."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}-{PYTHON}.json"
    path.write_text(json.dumps(_environment() | result, indent=1) + "\n")
    print(f"\nwritten: {path}")


def table(header: cabc.Sequence[str], rows: cabc.Iterable[cabc.Sequence[str]]) -> str:
    """Lay *rows* out in columns, the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _environment() -> dict[str, t.Any]:
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "gc": {"enabled": gc.isenabled(), "threshold": gc.get_threshold()},
        "switch_interval": sys.getswitchinterval(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
