from __future__ import annotations

import concurrent.futures
import typing as t
import weakref

import flask_mail
from flask import current_app

from ..api import find_holder
from ..executor.task import task
from ..on_success import run_on_success
from ..runner import notify

if t.TYPE_CHECKING:
    from flask import Flask

    from ..executor.scope import TaskScope

    Message: t.TypeAlias = flask_mail.Message | None


class Outbox:
    """How to tell of messages that are not sent, as in tests.

    :param on_success: Tell of them only where they would be sent, and in order.
    """

    def __init__(self, on_success: bool) -> None:
        self._on_success = on_success
        # What tells of the last one, by the scope.
        self._last: weakref.WeakKeyDictionary[
            TaskScope, concurrent.futures.Future[None]
        ] = weakref.WeakKeyDictionary()

    def tell(self, message: Message) -> None:
        scope = find_holder() if self._on_success else None

        if scope is None:
            announce([message])
        else:
            last = self._last.get(scope)
            self._last[scope] = run_on_success(_tell_next, last, message)


@task("flask_mail.send")
def _tell_next(last: concurrent.futures.Future[None] | None, message: Message) -> None:
    if last is not None:
        concurrent.futures.wait([last])

    announce([message])


def announce(messages: list[Message]) -> None:
    """Tell the receivers of Flask-Mail's signal of what they are to be told of."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]

    for message in messages:
        if message is not None:
            # It is delivered: a receiver that fails must not make it a failure.
            notify(flask_mail.email_dispatched, app, {"message": message})
