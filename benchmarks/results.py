"""What the scripts have in common: arguments, JSON files, tables, measures."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

NAMES: t.Final = ("dispatch", "load", "growth", "mail", "sizing")
PACKAGES: t.Final = (
    *("flask", "werkzeug", "flask-executor", "trio", "gunicorn"),
    *("flask-mail", "aiosmtpd"),
)
PYTHON: t.Final = f"{sys.version_info.major}.{sys.version_info.minor}"

Result: t.TypeAlias = dict[str, t.Any]


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the arguments that every script takes: ``--quick`` and ``--output``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a short run with fewer cases, whose figures are of no use",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("docs", "benchmarks"),
        help="the folder for what is written (default: %(default)s)",
    )
    return parser.parse_args()


def write(output: pathlib.Path, name: str, result: Result) -> None:
    """Write *result* and what it was measured on to ``NAME-PYTHON.json``."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}-{PYTHON}.json"
    path.write_text(dump(_environment() | result) + "\n")
    print(f"\nwritten: {path}")


def read(folder: pathlib.Path, python: str) -> dict[str, Result]:
    """Read what the scripts wrote on one Python version, by the script's name."""
    return {
        name: json.loads(path.read_text())
        for name in NAMES
        if (path := folder / f"{name}-{python}.json").exists()
    }


def dump(value: object, indent: str = "") -> str:
    """Return JSON with a line for each innermost object: one for each contender."""
    inner = indent + " "

    if isinstance(value, dict) and any(map(_is_nested, value.values())):
        items = [f"{json.dumps(key)}: {dump(value[key], inner)}" for key in value]
    elif isinstance(value, list) and any(map(_is_nested, value)):
        items = [dump(item, inner) for item in value]
    else:
        return json.dumps(value)

    start, end = "{}" if isinstance(value, dict) else "[]"
    lines = ",\n".join(inner + item for item in items)
    return f"{start}\n{lines}\n{indent}{end}"


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


def _is_nested(value: object) -> bool:
    return isinstance(value, (dict, list))


def _environment() -> Result:
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "packages": {
            name: importlib.metadata.version(name)
            for name in PACKAGES
            if importlib.util.find_spec(name.replace("-", "_"))
        },
    }
