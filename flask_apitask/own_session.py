from __future__ import annotations

import copy
import typing as t

from .context import is_in_task
from .context import task_locals

if t.TYPE_CHECKING:
    from flask.ctx import RequestContext as _Base
else:
    _Base = object

# A key of task_locals: the task's session, and a copy of what it held at first.
_SESSION: t.Final = "session"


class OwnSessions(_Base):
    """A request context in which each task has its own copy of the session.

    A task may write to the session before or after the response gets its cookie. With a
    copy, what a task writes never gets into the cookie. Flask-Login, which notes in the
    session how it found the user, works with a copy.
    """

    @property
    def session(self) -> t.Any:
        # Before Flask 3.1.3, the session is an attribute of the context.
        shared = vars(self).get("session")

        if shared is None:
            shared = super().session

        own = task_locals.get()

        # We don't know how to copy a session that is not a dict.
        if own is None or not is_in_task(self.request) or not isinstance(shared, dict):
            return shared

        if _SESSION not in own:
            # So that the response gets its "Vary: Cookie" header.
            t.cast("t.Any", shared).accessed = True
            session = type(shared).__new__(type(shared))
            vars(session).update(vars(shared))
            # dict() is one atomic step, because the view may be writing.
            copies = {key: _copy_twice(value) for key, value in dict(shared).items()}
            # dict.update() does not mark the session as modified.
            dict.update(session, {key: value for key, (value, _) in copies.items()})
            own[_SESSION] = session, {key: first for key, (_, first) in copies.items()}

        return own[_SESSION][0]

    @session.setter
    def session(self, session: t.Any) -> None:
        vars(self)["session"] = session


def find_changes(own: dict[object, t.Any]) -> list[str]:
    """Return the keys that a task has set or removed in its session.

    :param own: The task's locals. They hold a session only if the task has looked at
        it.
    """
    session, first = own.get(_SESSION, ({}, {}))
    now = dict(session)
    changed = (
        key
        for key, value in now.items()
        if key not in first or not _is_same(value, first[key])
    )
    return [*changed, *(key for key in first if key not in now)]


def _copy_twice(value: t.Any) -> tuple[t.Any, t.Any]:
    """Copy a value for a task, and once more to compare the first copy with at the end.

    If a value can't be copied, the task gets the view's own. If it does not equal its
    copy, only another object counts as a change.
    """
    own = _copy(value)
    first = own if own is value else _copy(own)
    return own, first if _is_same(own, first) else own


def _copy(value: t.Any) -> t.Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _is_same(value: object, first: object) -> bool:
    try:
        return value is first or bool(value == first)
    except Exception:
        return False
