"""For the tests of an app; nothing here is for an app itself."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import operator
import threading
import typing as t

from blinker import ANY
from flask import Flask
from werkzeug.local import LocalProxy

from .signals import task_dropped
from .signals import task_finished

if t.TYPE_CHECKING:
    import collections.abc as cabc


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class RecordedTask:
    """A task that ran, or that was dropped, as :func:`record_tasks` has seen it."""

    #: What logs and signals call it, see :func:`.task`.
    name: str
    #: The positional arguments that it was called with.
    args: tuple[t.Any, ...]
    #: Its keyword arguments.
    kwargs: dict[str, t.Any]
    #: ``"thread"``, ``"inline"``, ``"celery"`` or ``"dropped"``.
    how: str = "dropped"
    #: What it raised, ``None`` if it did not.
    exception: BaseException | None = None
    #: What it returned, ``None`` if it raised an exception or was dropped.
    result: t.Any = None
    #: The seconds that it ran.
    duration: float = 0.0
    #: When it was started by :func:`.run`, in seconds of :func:`time.monotonic`.
    submitted: float = dataclasses.field(repr=False)

    @property
    def dropped(self) -> bool:
        """Whether it was dropped or cancelled, and so never ran."""
        return self.how == "dropped"


@contextlib.contextmanager
def record_tasks(app: Flask | None = None) -> cabc.Iterator[list[RecordedTask]]:
    """Record the tasks that run, or that are dropped, during a ``with`` block.

    The list is in the order in which the tasks were started, by whatever thread. A task
    is in it once it is done: when the test client has returned, all are. Blocks may be
    nested, and each records all tasks. A plain call outside of any app context is not
    recorded.

    :param app: Record the tasks of this app only.
    :raises TypeError: ``app`` is no Flask app.
    """
    sender: t.Any = app

    if isinstance(sender, LocalProxy):
        sender = sender._get_current_object()

    if not isinstance(sender, Flask | None):
        raise TypeError(f"record_tasks() takes a Flask app, or nothing, not {app!r}.")

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
