from __future__ import annotations

import contextlib
import contextvars
import copy
import sys
import typing as t
from types import SimpleNamespace

from flask import g

from .context import find_app_context

if t.TYPE_CHECKING:
    from flask import Flask

# Where Flask-Babel 4 keeps the locale, the time zone and the effect of force_locale().
_BABEL: t.Final = "_flask_babel"
_MISSING: t.Final = object()

_copied: contextvars.ContextVar[dict[str, t.Any]] = contextvars.ContextVar(
    "flask_apitask_copied_g"
)


def find_copier(app: Flask, names: tuple[str, ...]) -> GCopier | None:
    """Return a copier for these names and Flask-Babel's locale, if there are any."""
    # Other libraries register themselves as "babel" too.
    has_babel = "babel" in app.extensions and "flask_babel" in sys.modules
    return GCopier(names, has_babel) if names or has_babel else None


class GCopier:
    """Copies values from the ``g`` of a task's caller to the task's own."""

    def __init__(self, names: tuple[str, ...], has_babel: bool) -> None:
        self._names = names
        self._has_babel = has_babel

    def copy_context(self) -> contextvars.Context:
        """Copy the caller's context variables, and the values now on its ``g``."""
        context = contextvars.copy_context()

        if find_app_context() is not None:
            context.run(_copied.set, self._find())

        return context

    def put(self) -> None:
        """Put the copied values on the task's ``g``."""
        for name, value in _copied.get({}).items():
            # A task may change its locale. Its done callbacks must not see that.
            own = copy.copy(value) if name == _BABEL else value
            setattr(g, name, own)

    def _find(self) -> dict[str, t.Any]:
        copied = {
            name: value
            for name in self._names
            if (value := g.get(name, _MISSING)) is not _MISSING
        }

        if self._has_babel:
            copied[_BABEL] = _copy_babel()

        return copied


def _copy_babel() -> SimpleNamespace:
    """Copy Flask-Babel's state, after calling any selectors that it has not called yet.

    The selectors may look at the user, the view's arguments or anything else on ``g``.
    The caller may not have set all of it yet, so it does not get to see their results.
    """
    babel = sys.modules["flask_babel"]
    kept = g.get(_BABEL)
    own = SimpleNamespace(**vars(kept or SimpleNamespace()))
    setattr(g, _BABEL, own)

    try:
        # If they fail, without a request for example, they fail again in the task, but
        # only if the task needs them.
        with contextlib.suppress(Exception):
            babel.get_locale()
            babel.get_timezone()
    finally:
        if kept is None:
            g.pop(_BABEL)
        else:
            setattr(g, _BABEL, kept)

    return own
