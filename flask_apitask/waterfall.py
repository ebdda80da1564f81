from __future__ import annotations

import dataclasses
import math
import operator

# Percent of the width, so that even a task that took no time is visible.
_LEAST: float = 0.4
# Pixels from one row of the chart to the next.
_ROW: int = 20


@dataclasses.dataclass(slots=True, eq=False)
class Span:
    """A task, or another part of a request, on the timeline.

    The times are seconds of :func:`time.monotonic`.

    :param how: How a task ran (see :data:`.task_started`), or ``"dropped"``,
        ``"view"`` or ``"wait"``.
    :param finished: ``None`` while it runs.
    :param error: The last line of the traceback, or why it was dropped.
    """

    name: str
    how: str
    submitted: float
    started: float
    finished: float | None = None
    thread: int = 0
    error: str = ""
    traceback: str = ""

    @property
    def outcome(self) -> str:
        if self.how in ("view", "wait", "dropped"):
            return self.how

        if self.finished is None:
            return "running"

        return "failed" if self.error else "done"

    @property
    def duration(self) -> float:
        """How many seconds it ran; 0 while it is still running."""
        return max(0.0, (self.finished or 0.0) - self.started)


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """A row of the chart; positions and widths are in percent."""

    label: str
    outcome: str
    y: int
    queued_x: float
    queued_width: float
    x: float
    width: float


class Waterfall:
    """The chart of what ran when in a request.

    :param begun: When the request began.
    :param view: The view, if there was one.
    :param end: The wait at the end of the request.
    """

    def __init__(
        self, begun: float, view: Span | None, tasks: list[Span], end: Span
    ) -> None:
        self.begun = begun
        self.view = view
        self.tasks: list[Span] = sorted(tasks, key=operator.attrgetter("submitted"))
        self.end = end
        self.total: float = (end.finished or end.started) - begun
        on_threads = [task.duration for task in tasks if task.how == "thread"]
        self.in_tasks: float = sum(on_threads)
        # An upper bound: the view may wait too, and that can't be told from its work.
        self.saved: float = max(0.0, self.in_tasks - end.duration)

    @property
    def title(self) -> str:
        count = len(self.tasks)
        text = f"{count} task" if count == 1 else f"{count} tasks"
        return f"{text}, up to {seconds(self.saved)} saved" if self.saved else text

    @property
    def rows(self) -> list[Row]:
        spans = [*self.tasks, self.end]
        spans = spans if self.view is None else [self.view, *spans]
        return [self._make_row(span, number) for number, span in enumerate(spans, 1)]

    @property
    def height(self) -> int:
        return _ROW * (len(self.rows) + 1)

    @property
    def ticks(self) -> list[tuple[int, str, str]]:
        """Positions in percent, each with a text and its anchor."""
        anchors = {0: "start", 50: "middle", 100: "end"}
        return [
            (x, seconds(self.total * x / 100), anchor) for x, anchor in anchors.items()
        ]

    def offset(self, span: Span) -> str:
        """Return how long after the beginning of the request something started."""
        return seconds(span.started - self.begun)

    def _make_row(self, span: Span, number: int) -> Row:
        end = self.begun + self.total
        finished = end if span.finished is None else span.finished
        text = {"done": "", "view": "", "wait": ""}.get(span.outcome, span.outcome)
        how = span.how if span.how == "inline" else ""
        details = [seconds(finished - span.started), how, text]
        label = " · ".join([span.name, *filter(None, details)])
        queued, x = self._scale(span.submitted), self._scale(span.started)
        width = max(_LEAST, self._scale(finished) - x)
        x = min(x, 100 - width)
        y = number * _ROW
        return Row(label, span.outcome, y, queued, max(0.0, x - queued), x, width)

    def _scale(self, moment: float) -> float:
        """Return a position on the timeline, in percent."""
        share = (moment - self.begun) / (self.total or math.inf)
        return round(100 * min(1.0, max(0.0, share)), 3)


def seconds(number: float) -> str:
    """Format a number of seconds for display."""
    return f"{number:.2f} s" if number >= 1 else f"{1000 * number:.1f} ms"
