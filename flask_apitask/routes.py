from __future__ import annotations

import fnmatch
import functools
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .config import Routes

    Work: t.TypeAlias = "tuple[t.Any, tuple[t.Any, ...], dict[str, t.Any]]"

# Routes a task. Only set once an app of this process routes tasks to Celery, so that
# other processes don't pay for it.
router: cabc.Callable[[t.Any, tuple[t.Any, ...], dict[str, t.Any]], Work] | None = None


@functools.lru_cache(maxsize=1024)
def find_route(routes: Routes, name: str) -> str:
    """Return where tasks of this name run, by the first pattern that matches."""
    for pattern, route in routes:
        if fnmatch.fnmatchcase(name, pattern):
            return route

    return "thread"


def is_for_celery(routes: Routes, name: str) -> bool:
    """Tell whether tasks of this name go to Celery."""
    return find_route(routes, name) == "celery"
