from __future__ import annotations

import copy
import functools
import typing as t

from .context import is_in_task
from .context import task_locals

if t.TYPE_CHECKING:
    from flask.ctx import RequestContext as _Base
else:
    _Base = object

_SESSION: t.Final = "session"


class OwnSession(t.NamedTuple):
    """The session of one task, and what it was when the task first looked at it."""

    session: t.Any
    before: dict[str, t.Any]

    def changed(self) -> list[str]:
        """Name what the task has set or removed."""
        before, now = self.before.items(), self.session.items()
        changed = [key for key, value in now if (key, value) not in before]
        return [*changed, *(key for key in self.before if key not in self.session)]


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
            own[_SESSION] = OwnSession(session, copy.deepcopy(dict(session)))

        return own[_SESSION].session

    @session.setter
    def session(self, session: t.Any) -> None:
        vars(self)["session"] = session


def own_sessions(request_context: t.Any) -> None:
    """Give each task of a request a session of its own. Idempotent."""
    context_class: t.Any = type(request_context)

    if not issubclass(context_class, OwnSessions):
        request_context.__class__ = _with_own_sessions(context_class)


@functools.lru_cache
def _with_own_sessions(context_class: t.Any) -> t.Any:
    return type(context_class.__name__, (OwnSessions, context_class), {})


def find_changes(own: dict[object, t.Any]) -> list[str]:
    """Name what a task has changed in its session, if it is among what the task has."""
    return own[_SESSION].changed() if _SESSION in own else []
