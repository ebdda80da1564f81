"""Helpers for the tests of an app; the app itself has no use for them."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import operator
import threading
import typing as t

from blinker import ANY

from .context import unwrap_app
from .signals import task_dropped
from .signals import task_finished

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class RecordedTask:
    """A task that ran or was dropped, as recorded by :func:`record_tasks`."""

    #: Its name in logs and signals, see :func:`.task`.
    name: str
    #: Its positional arguments.
    args: tuple[t.Any, ...]
    #: Its keyword arguments.
    kwargs: dict[str, t.Any]
    #: ``"thread"``, ``"inline"``, ``"celery"`` or ``"dropped"``.
    how: str = "dropped"
    #: What it raised, or ``None``.
    exception: BaseException | None = None
    #: What it returned, ``None`` if it raised an exception or was dropped.
    result: t.Any = None
    #: How long it ran, in seconds.
    duration: float = 0.0
    #: When :func:`.run` started it, in seconds of :func:`time.monotonic`.
    submitted: float = dataclasses.field(repr=False)

    @property
    def dropped(self) -> bool:
        """Whether it was dropped or cancelled, and so never ran."""
        return self.how == "dropped"


@contextlib.contextmanager
def record_tasks(app: Flask | None = None) -> cabc.Iterator[list[RecordedTask]]:
    """Record the tasks that run or are dropped during a ``with`` block.

    A task is added to the list once it is done, so all tasks of a request are there
    when the test client returns. The list is in the order in which the tasks were
    started, by whatever thread. Blocks can be nested, and each records every task.
    Plain calls outside any app context are not recorded.

    :param app: Record only the tasks of this app.
    :raises TypeError: ``app`` is not a Flask app.
    """
    sender: t.Any = None

    if app is not None:
        sender = unwrap_app(app, "record_tasks() takes a Flask app, or nothing")

    tasks: list[RecordedTask] = []
    # Guards the list.
    lock = threading.Lock()

    def note(
        sender: Flask,
        *,
        started: float = 0.0,
        finished: float = 0.0,
        reason: str | None = None,
        **fields: t.Any,
    ) -> None:
        task = RecordedTask(duration=finished - started, **fields)

        with lock:
            bisect.insort(tasks, task, key=operator.attrgetter("submitted"))

    sender = sender or ANY

    with (
        task_finished.connected_to(note, sender),
        task_dropped.connected_to(note, sender),
    ):
        yield tasks
