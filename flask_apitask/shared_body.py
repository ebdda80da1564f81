from __future__ import annotations

import contextlib
import threading
import typing as t

from flask import Request

from .context import mix_in
from .shared_uploads import share_files

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from werkzeug.datastructures import FileStorage
    from werkzeug.datastructures import ImmutableMultiDict

_LOCK = "_flask_apitask_body"


class SharedBody(Request):
    """A request whose body several threads may ask for.

    Werkzeug reads a body when it is first asked for, and keeps what it has made of it.
    Two threads that ask at once would read one stream by turns, and one of them would
    wait for bytes that never come. Here the first one reads, the others wait for it and
    find what it has kept, or get the error that it got. All other ways to the body
    (``json``, ``data``, ``values``...) lead through these three. ``stream`` is left to
    whoever reads it.
    """

    def get_data(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        with vars(self)[_LOCK].reading(self):
            return super().get_data(*args, **kwargs)

    @property
    def form(self) -> ImmutableMultiDict[str, str]:
        with vars(self)[_LOCK].reading(self):
            return super().form

    @property
    def files(self) -> ImmutableMultiDict[str, FileStorage]:
        with vars(self)[_LOCK].reading(self):
            files = super().files
            share_files(files)
            return files


class BodyLock:
    """Lets one thread at a time read a body, and remembers how that failed."""

    def __init__(self) -> None:
        # Guards the stream and all that the request keeps of it. It is held while a
        # client sends; only threads that want the same body wait for it.
        self._lock = threading.RLock()
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def reading(self, request: Request) -> cabc.Iterator[None]:
        """Let the caller read, unless that has failed before."""
        with self._lock:
            if self._error is not None:
                raise _copy(self._error)

            try:
                yield
            except BaseException as error:
                # What is left of a stream must not pass for the whole. A body that was
                # refused unread, for its length, may be asked for again.
                if "stream" in vars(request):
                    self._error = _copy(error)

                raise


def share_body(request: Request) -> None:
    """Let several threads ask for the body of a request, if it has one. Idempotent."""
    # Two threads may come at once, if both start the first task.
    if _has_body(request.environ) and not isinstance(request, SharedBody):
        vars(request).setdefault(_LOCK, BodyLock())
        mix_in(request, SharedBody)

        # The view may have some of them in its hands.
        if "files" in vars(request):
            share_files(vars(request)["files"])


def _has_body(environ: cabc.Mapping[str, t.Any]) -> bool:
    if environ.get("CONTENT_LENGTH", "") not in {"", "0"}:
        return True

    # Werkzeug reads nothing without a length, unless the server says where it ends.
    # Some say so of each request, and most have none.
    return "wsgi.input_terminated" in environ and (
        environ["REQUEST_METHOD"] not in {"GET", "HEAD"}
        or "HTTP_TRANSFER_ENCODING" in environ
    )


def _copy(error: BaseException) -> BaseException:
    """Copy an exception without its traceback, which refers to the request."""
    copy = type(error).__new__(type(error), *error.args)
    vars(copy).update(vars(error))
    return copy
