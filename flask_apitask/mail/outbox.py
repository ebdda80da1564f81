from __future__ import annotations

import concurrent.futures
import typing as t
import weakref

from ..api import find_holder

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from ..executor.scope import TaskScope

    Announce: t.TypeAlias = cabc.Callable[[], object]


class Outbox:
    """Announces messages that are suppressed and so not sent, as in tests.

    :param on_success: Announce only those that would be sent, and in order.
    """

    def __init__(self, on_success: bool) -> None:
        self._on_success = on_success
        # The future of the last announcement of each scope.
        self._last: weakref.WeakKeyDictionary[
            TaskScope, concurrent.futures.Future[None]
        ] = weakref.WeakKeyDictionary()

    def tell(self, announce: Announce) -> None:
        if self._on_success and (scope := find_holder()) is not None:
            # Not with run_on_success(): nothing is sent, so nothing may go to Celery.
            work = self._last.get(scope), announce
            held = scope.hold(_tell_next, work, {}, for_success=True)

            if held is not None:
                self._last[scope] = held
                return

        announce()


def _tell_next(
    last: concurrent.futures.Future[None] | None, announce: Announce
) -> None:
    if last is not None:
        concurrent.futures.wait([last])

    announce()


# Not with task(), which would give a second function this name.
_tell_next.task_name = "flask_mail.send"  # type: ignore[attr-defined]
