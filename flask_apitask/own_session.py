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
            # In one step, as the view may write; and nothing takes it for a change.
            dict.update(session, copy.deepcopy(dict(shared)))
            own[_SESSION] = session, copy.deepcopy(dict(session))

        return own[_SESSION][0]

    @session.setter
    def session(self, session: t.Any) -> None:
        vars(self)["session"] = session


def find_changes(own: dict[object, t.Any]) -> list[str]:
    """Name what a task has set or removed in its session, from what it has of its own.

    A task that has not looked at the session has none.
    """
    now, before = own.get(_SESSION, ({}, {}))
    changed = [key for key, value in now.items() if (key, value) not in before.items()]
    return [*changed, *(key for key in before if key not in now)]
