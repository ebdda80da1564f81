from __future__ import annotations

import typing as t

from flask_apitask.jobs import Unbound

if t.TYPE_CHECKING:
    from flask_apitask.jobs import Overdue


class Reporting(Unbound):
    """Keeps what is reported of scopes that end at their deadline."""

    def __init__(self) -> None:
        self.reports: list[Overdue] = []

    def report(self, overdue: Overdue) -> None:
        self.reports.append(overdue)
