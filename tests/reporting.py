from __future__ import annotations

import typing as t

from flask_apitask.executor.runner import Runner

if t.TYPE_CHECKING:
    from flask_apitask.executor.runner import TimeoutReport


class Reporting(Runner):
    """Keeps the reports of scopes that end at their deadline."""

    def __init__(self) -> None:
        self.reports: list[TimeoutReport] = []

    def report(self, report: TimeoutReport) -> None:
        self.reports.append(report)
