from __future__ import annotations

import contextvars
import logging
import typing as t

from ..log import log

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import concurrent.futures

How = t.Literal["thread", "inline", "celery"]
# A task, its arguments, and when it was submitted, in seconds of time.monotonic().
Work: t.TypeAlias = (
    "tuple[cabc.Callable[..., t.Any], tuple[t.Any, ...], dict[str, t.Any], float]"
)

_logger = logging.getLogger("flask_apitask")


class TimeoutReport(t.NamedTuple):
    """What a scope left behind when it ended at its deadline.

    :param timeout: Seconds that it waited.
    :param cancelled: The names of tasks that no thread had begun. They will never run.
    :param running: The names of tasks still running, each with its thread's stack as
        text.
    :param abandoned: How many threads of the pool the overdue tasks of all scopes hold
        now.
    """

    timeout: float
    cancelled: list[str]
    running: list[tuple[str, str]]
    abandoned: int


class Runner:
    """How a scope calls its tasks. This base class does nothing but call them."""

    # The exception of a task that the end of the scope is to raise.
    raised: BaseException | None = None
    # Copies the context variables of the thread that starts a task, for the task.
    copy_context: cabc.Callable[[], contextvars.Context]
    copy_context = staticmethod(contextvars.copy_context)

    def run(self, work: Work, how: How) -> t.Any:
        """Call a task, on its thread and with its context variables."""
        task, args, kwargs, _ = work
        return task(*args, **kwargs)

    def call_back(
        self,
        callback: cabc.Callable[[concurrent.futures.Future[t.Any]], object],
        future: concurrent.futures.Future[t.Any],
    ) -> None:
        """Call a done callback of a future. Never raises."""
        try:
            callback(future)
        except BaseException as error:
            log(_logger, logging.ERROR, "A done callback failed.", error=error)

    def drop(self, work: Work, reason: str | None = None) -> None:
        """Report that a task will never run. Called with its context variables.

        :param reason: A clause; ``None`` if the future was cancelled.
        """
        if reason is not None:
            log(_logger, logging.INFO, "%r was dropped: %s.", work[0], reason)

    def report(self, report: TimeoutReport) -> None:
        """Report what a scope left behind, in the thread that waited. Never raises."""
        log(_logger, logging.WARNING, "A scope left tasks behind: %s", report)
