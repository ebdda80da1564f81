from __future__ import annotations

import typing as t

from werkzeug.exceptions import HTTPException

if t.TYPE_CHECKING:
    import collections.abc as cabc

_NOT_ENDED: t.Final = "the stream or block was closed before its end"


def find_failure(error: BaseException | None) -> str | None:
    """Return why an exception means failure, or ``None`` if it does not.

    An HTTP exception that redirects, as in ``abort(redirect("/"))``, is a success.
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
    """The body of a streamed response; reports at its close whether it reached its end.

    A body that was never begun is no failure: that of a ``HEAD`` response is not read.

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
