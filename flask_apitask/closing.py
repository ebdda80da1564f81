from __future__ import annotations

import contextvars
import functools
import sys
import typing as t
import weakref
from collections import deque

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Response

# Of a request context: a weak reference to the closing of its response. A copy of the
# context, and that of a nested request, has none.
_CLOSING = "_flask_apitask_closing"
# Of a response: the closings that it holds. Some apps answer with one object for ever.
_PENDING = "_flask_apitask_pending"


class Closing:
    """What is waited for when the server closes the response to a request.

    Only the response holds it, and only until it is closed. So there is none where
    nobody would wait: after that, or once the response was thrown away.

    What could break it, and what prevents it: *late addition.* One thread closes and
    finds nothing, and another adds. So who closes says so before it looks, and who adds
    looks after that whether it was said.
    """

    def __init__(self) -> None:
        # Flask pops the request's contexts before. What is logged finds them here.
        self._context = contextvars.copy_context()
        self._ends: deque[cabc.Callable[[], None]] = deque()
        self._closed = False

    def add(self, end: cabc.Callable[[], None]) -> None:
        """Have a function called, in the context of the request."""
        self._ends.append(end)

        if self._closed:
            self.close()

    def close(self) -> None:
        """Call what was added, once."""
        self._closed = True

        for end in drain(self._ends):
            # In a copy, as another thread may be in this one.
            self._context.copy().run(end)


def hook(request_context: object, response: Response) -> None:
    """Give the current request a closing that its response holds."""
    # Else the server is given the body alone, and closes that alone.
    response.direct_passthrough = False
    pending: deque[Closing] | None = vars(response).get(_PENDING)

    if pending is None:
        pending = vars(response)[_PENDING] = deque()
        response.call_on_close(functools.partial(_close, pending))

    closing = Closing()
    pending.append(closing)
    setattr(request_context, _CLOSING, weakref.ref(closing))


def unhook(request_context: object) -> None:
    """Forget a response that will not be the one that is sent."""
    setattr(request_context, _CLOSING, None)


def find_closing(request_context: object) -> Closing | None:
    """Return the closing of a request whose response is hooked, and is to be closed."""
    reference: weakref.ref[Closing] | None = getattr(request_context, _CLOSING, None)

    if reference is None:
        return None

    error = sys.exc_info()[1]
    # With an exception on its way, the server will have no response to close. But this
    # one is raised where it closes a generator that has the request's context.
    is_sent = error is None or isinstance(error, GeneratorExit)
    return reference() if is_sent else None


def _close(pending: deque[Closing]) -> None:
    for closing in drain(pending):
        closing.close()


T = t.TypeVar("T")


def drain(items: deque[T]) -> cabc.Iterator[T]:
    """Take and yield each item, also where another thread does the same."""
    while True:
        try:
            item = items.popleft()
        except IndexError:
            return

        yield item
