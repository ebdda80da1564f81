from __future__ import annotations

import contextlib
import contextvars
import threading
import typing as t

if t.TYPE_CHECKING:
    from flask import Response

    from .executor.scope import TaskScope

# An attribute of a response: the closings to run when it is closed.
_CLOSINGS: t.Final = "_flask_apitask_closings"


class Closing:
    """The scopes that end when the server closes a response.

    :param answers_first: The request's own scope ends here too.
    :param is_stream: The request succeeds only if its body reaches its end.
    """

    def __init__(self, answers_first: bool, is_stream: bool = False) -> None:
        self.answers_first = answers_first
        self.is_stream = is_stream
        self._failure: str | None = None
        # Flask pops the request's contexts before the close. Log records still need
        # them.
        self._context = contextvars.copy_context()
        # Guards the attributes below: a scope may be added while another thread closes.
        self._lock = threading.Lock()
        # Each with whether it has been waited for before.
        self._scopes: dict[TaskScope, bool] = {}
        self._closed = False

    @property
    def settles(self) -> bool:
        """Whether the success of the request is known only at the close."""
        return self.answers_first or self.is_stream

    def add(self, *scopes: TaskScope, waited_for: bool = False) -> BaseException | None:
        """End scopes at the close, or now if the response is already closed.

        :param waited_for: These scopes have been waited for already. At the close, the
            tasks that still wait for success are started or dropped, and a scope is
            waited for again only if some are started.
        :return: As for :meth:`end`.
        """
        for scope in scopes:
            scope.shutdown(wait=False)

        with self._lock:
            self._scopes |= dict.fromkeys(scopes, waited_for)
            closed = self._closed

        return self.end() if closed else None

    def close(self, failure: str | None = None) -> None:
        """End the scopes, and raise what a task raised if that is configured."""
        raise_error(self.end(failure))

    def end(self, failure: str | None = None) -> BaseException | None:
        """End the scopes, each once.

        :param failure: What went wrong with the body, if anything did.
        :return: The exception to raise afterwards, if any.
        """
        with self._lock:
            self._closed = True
            self._failure = failure = self._failure or failure
            scopes, self._scopes = self._scopes, {}

        ending = tuple(
            scope
            for scope, waited_for in scopes.items()
            if scope.settle(failure) or not waited_for
        )

        # In a copy, because another thread may be running in this context.
        return self._context.copy().run(end_all, ending)


def close_with(response: Response, closing: Closing) -> None:
    """Make a response wait when the server closes it."""
    # Otherwise the server is given only the body, and closes only that.
    response.direct_passthrough = False
    closings: list[Closing] | None = vars(response).get(_CLOSINGS)

    # Some apps return the same response object every time, so it is hooked only once.
    if closings is None:
        closings = vars(response)[_CLOSINGS] = []
        response.call_on_close(lambda: _close(closings))

    closings.append(closing)


def _close(closings: list[Closing]) -> None:
    for closing in tuple(closings):
        closing.close()

        # Another thread may be closing the same object as its own request's response.
        with contextlib.suppress(ValueError):
            closings.remove(closing)


def end_all(scopes: tuple[TaskScope, ...]) -> BaseException | None:
    """End scopes in order, the rest of them even if one wait is interrupted.

    :return: The exception to raise afterwards, if any.
    """
    raised: BaseException | None = None

    for count, scope in enumerate(scopes, 1):
        try:
            error = scope.end()
        except BaseException:
            end_all(scopes[count:])
            raise

        raised = raised or error

    return raised


def raise_error(error: BaseException | None) -> None:
    """Raise an exception if there is one."""
    try:
        if error is not None:
            raise error
    finally:
        # The traceback refers to this frame: avoid a reference cycle.
        del error
