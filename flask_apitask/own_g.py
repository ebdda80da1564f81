from __future__ import annotations

import contextlib
import contextvars
import sys
import typing as t
from types import SimpleNamespace

from flask import g

from .context import find_app_context

if t.TYPE_CHECKING:
    from flask import Flask

# Where Flask-Babel 4 keeps the locale, the time zone and what force_locale() has set.
_BABEL: t.Final = "_flask_babel"
_MISSING: t.Final = object()

_copied: contextvars.ContextVar[dict[str, t.Any]] = contextvars.ContextVar(
    "flask_apitask_copied_g"
)


def find_copier(app: Flask, names: tuple[str, ...]) -> GCopier | None:
    """Return what copies these names and Flask-Babel's locale, if there are any."""
    # Other libraries go by that name, too.
    has_babel = "babel" in app.extensions and "flask_babel" in sys.modules
    return GCopier(names, has_babel) if names or has_babel else None


class GCopier:
    """Takes what a task needs from its caller's ``g`` to the task's own."""

    def __init__(self, names: tuple[str, ...], has_babel: bool) -> None:
        self._names = names
        self._has_babel = has_babel

    def copy_context(self) -> contextvars.Context:
        """Copy the caller's context variables, with what is on its ``g`` now."""
        context = contextvars.copy_context()

        if find_app_context() is not None:
            context.run(_copied.set, self._find())

        return context

    def put(self) -> None:
        """Put on the task's ``g`` the values that were found on its caller's."""
        for name, value in _copied.get({}).items():
            setattr(g, name, value)

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
    """Copy the state of Flask-Babel, and call the selectors that it has not called yet.

    They may look at the user, the view's arguments or anything else on ``g``. The
    caller may not have set all of that yet, so their results are not kept for it.
    """
    babel = sys.modules["flask_babel"]
    kept = g.get(_BABEL)
    copy = SimpleNamespace(**vars(kept or SimpleNamespace()))
    setattr(g, _BABEL, copy)

    try:
        # Where they fail, for want of a request, they do so in a task that needs them.
        with contextlib.suppress(Exception):
            babel.get_locale()
            babel.get_timezone()
    finally:
        if kept is None:
            g.pop(_BABEL)
        else:
            setattr(g, _BABEL, kept)

    return copy
