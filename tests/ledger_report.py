from __future__ import annotations

import json
import os
import pathlib
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc


class Report:
    """What runs have counted, as JSON and as a table for the docs.

    A run takes the place of an earlier one of the same labels.

    ``APITASK_LEDGER_REPORT`` names the folder that it is in. Without it there is none.

    :param name: Of the two files, without the suffix.
    :param labels: Keys of a row that tell what was run, with their headings.
    :param numbers: Keys of a row that tell what came of it.
    """

    def __init__(
        self,
        name: str,
        labels: cabc.Mapping[str, str],
        numbers: cabc.Mapping[str, str],
    ) -> None:
        self._name = name
        self._labels = labels
        self._numbers = numbers

    def add(self, row: cabc.Mapping[str, t.Any]) -> None:
        """Add a run, with a value for each key."""
        folder = os.environ.get("APITASK_LEDGER_REPORT")

        if not folder:
            return

        book = pathlib.Path(folder, f"{self._name}.json")
        rows = json.loads(book.read_text()) if book.exists() else []
        rows = [other for other in rows if self._label(other) != self._label(row)]
        rows = sorted([*rows, row], key=self._label)
        book.write_text(json.dumps(rows, indent=1) + "\n")
        book.with_suffix(".md").write_text(self._table(rows))

    def _label(self, row: cabc.Mapping[str, t.Any]) -> list[str]:
        return [row[key] for key in self._labels]

    def _table(self, rows: list[dict[str, t.Any]]) -> str:
        lines = [
            [*self._labels.values(), *self._numbers.values()],
            ["---"] * len(self._labels) + ["--:"] * len(self._numbers),
        ]
        lines += [
            [f"{row[key]}" for key in (*self._labels, *self._numbers)] for row in rows
        ]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
