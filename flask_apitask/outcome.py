from __future__ import annotations

import typing as t

from werkzeug.exceptions import HTTPException

if t.TYPE_CHECKING:
    import collections.abc as cabc

_NOT_ENDED: t.Final = "it was left before its end"


def find_failure(error: BaseException | None) -> str | None:
    """Say why there is no success, if that is so, for an exception that was raised.

    An exception of Werkzeug's that answers with a redirect is a success, as in
    ``abort(redirect("/"))``.
    """
    if error is None:
        return None

    if isinstance(error, HTTPException):
        code = error.response.status_code if error.response else error.code

        if code is not None and code < 400:
            return None

    if isinstance(error, GeneratorExit):
        return _NOT_ENDED

    return f"{type(error).__name__} was raised"


class WatchedBody:
    """The body of a stream, which says at its close whether it came to its end.

    One that was never begun is as good: no client wants the body of a ``HEAD``.

    :param close: Called with the reason of a failure, if there was one.
    """

    def __init__(
        self, body: cabc.Iterable[t.Any], close: cabc.Callable[[str | None], None]
    ) -> None:
        self._body = body
        self._items: cabc.Iterator[t.Any] | None = None
        self._failure: str | None = None
        self._close = close

    def __iter__(self) -> cabc.Iterator[t.Any]:
        return self

    def __next__(self) -> t.Any:
        try:
            if self._items is None:
                self._failure = _NOT_ENDED
                self._items = iter(self._body)

            return next(self._items)
        except StopIteration:
            self._failure = None
            raise
        except BaseException as error:
            self._failure = find_failure(error)
            raise

    def close(self) -> None:
        try:
            if hasattr(self._body, "close"):
                self._body.close()
        except BaseException as error:
            self._failure = find_failure(error)
            raise
        finally:
            self._close(self._failure)
