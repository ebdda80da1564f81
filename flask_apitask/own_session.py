from __future__ import annotations

import copy
import typing as t

from .context import is_in_task
from .context import task_locals

if t.TYPE_CHECKING:
    from flask.ctx import RequestContext as _Base
else:
    _Base = object

# Of what a task has for itself: its session, and what that was at first.
_SESSION: t.Final = "session"


class OwnSessions(_Base):
    """A request context in which each task has a session of its own.

    The response, with the cookie, may be made before a task writes to the session or
    after that. So what a task writes is never in it: the task reads and writes a copy.
    Flask-Login, which notes there how it has found the user, works with that.
    """

    @property
    def session(self) -> t.Any:
        # Before Flask 3.1.3 it is an attribute of the context.
        shared = vars(self).get("session")

        if shared is None:
            shared = super().session

        own = task_locals.get()

        # A mapping of another kind can't be copied without knowing it.
        if own is None or not is_in_task(self.request) or not isinstance(shared, dict):
            return shared

        if _SESSION not in own:
            # So that the response says that it may depend on the cookie.
            t.cast("t.Any", shared).accessed = True
            session = type(shared).__new__(type(shared))
            vars(session).update(vars(shared))
            # The view may write: its items are had in one step.
            copies = {key: _copy_twice(value) for key, value in dict(shared).items()}
            # Nothing takes it for a change.
            dict.update(session, {key: value for key, (value, _) in copies.items()})
            own[_SESSION] = session, {key: first for key, (_, first) in copies.items()}

        return own[_SESSION][0]

    @session.setter
    def session(self, session: t.Any) -> None:
        vars(self)["session"] = session


def find_changes(own: dict[object, t.Any]) -> list[str]:
    """Name what a task has set or removed in its session, from what it has of its own.

    A task that has not looked at the session has none.
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
    """Copy a value for a task, and again to compare that with at the end.

    A value that can't be copied is the view's own. One that doesn't equal its copy is
    known by its identity alone.
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
