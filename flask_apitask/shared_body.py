from __future__ import annotations

import contextlib
import io
import os
import threading
import typing as t

from flask import Request
from werkzeug.utils import cached_property

from .context import mix_in
from .context import task_locals
from .executor.task import look_up
from .shared_uploads import close_files
from .shared_uploads import share_files
from .shared_uploads import SharedFile

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from werkzeug.datastructures import FileStorage
    from werkzeug.datastructures import ImmutableMultiDict

_LOCK: t.Final = "_flask_apitask_body"
_URLENCODED: t.Final = "application/x-www-form-urlencoded"
_FORMS: t.Final = {_URLENCODED, "multipart/form-data"}
_NOBODY: t.Final = object()


class _live_property(cached_property[t.Any]):
    """A property that can be set as Werkzeug's can, but asks its function each time."""

    def __get__(self, request: t.Any, kind: t.Any = None) -> t.Any:
        return self if request is None else self.fget(request)  # type: ignore[misc]


class SharedBody(Request):
    """A request whose body several threads may ask for.

    Werkzeug reads a body when it is first asked for, and keeps what it has made of it.
    Two threads that ask at once would read one stream by turns, and one of them would
    wait for bytes that never come. Here the first one reads, the others wait for it and
    find what it has kept, or get the error that it got. All other ways to the body
    (``json``, ``data``, ``values``...) lead through these four.
    """

    def get_data(
        self, cache: bool = True, as_text: t.Any = False, parse_form_data: bool = False
    ) -> t.Any:
        with vars(self)[_LOCK].reading(self):
            # The next one may ask in another way, so it is kept in any case.
            return super().get_data(
                cache=True, as_text=as_text, parse_form_data=parse_form_data
            )

    @_live_property
    def form(self) -> ImmutableMultiDict[str, str]:
        with vars(self)[_LOCK].reading(self, form=True):
            return super().form

    @_live_property
    def files(self) -> ImmutableMultiDict[str, FileStorage]:
        with vars(self)[_LOCK].reading(self, form=True):
            files = super().files
            share_files(files)
            return files

    @_live_property
    def stream(self) -> t.IO[bytes]:
        with vars(self)[_LOCK].taking(self):
            return super().stream

    def close(self) -> None:
        super().close()
        close_files(vars(self).get("files") or ())


class BodyLock:
    """Lets one thread at a time read a body, and remembers how that went.

    :param is_taken: Whether the caller has the stream, to read it by itself.
    """

    def __init__(self, is_taken: bool) -> None:
        # Guards the stream and all that the request keeps of it. It is held while a
        # client sends; only threads that want the same body wait for it.
        self._lock = threading.RLock()
        self._error: BaseException | None = None
        # What reads the stream by itself: None for the view, or what a task has.
        self._taker: object = task_locals.get() if is_taken else _NOBODY
        # Whether it is Werkzeug that asks for the stream.
        self._is_reading = False

    @contextlib.contextmanager
    def reading(self, request: Request, form: bool = False) -> cabc.Iterator[None]:
        """Let the caller read, unless that has failed before or can't succeed."""
        with self._lock:
            # Nothing is read for the form of a body that is none.
            if not form or request.mimetype in _FORMS:
                self._check()

            was_reading, self._is_reading = self._is_reading, True
            stream = vars(request).get("stream")

            try:
                # Once it is parsed, it would be gone for those who want it as it is.
                if request.mimetype == _URLENCODED:
                    Request.get_data(request)

                yield
            except BaseException as error:
                # What is left of a stream must not pass for the whole. A body that was
                # refused unread, for its length, may be asked for again.
                if "stream" in vars(request) and not _is_kept(request):
                    self._error = _copy(error)

                raise
            finally:
                self._is_reading = was_reading

            if not was_reading:
                _share_stream(request, stream)

    @contextlib.contextmanager
    def taking(self, request: Request) -> cabc.Iterator[None]:
        """Let the caller have the stream, which is then for nothing else to read."""
        with self._lock:
            if self._is_reading:
                yield
                return

            self._check()
            yield

            if not _is_kept(request):
                self._taker = task_locals.get()

    def _check(self) -> None:
        if self._error is not None:
            raise _copy(self._error)

        if self._taker is not _NOBODY and self._taker is not task_locals.get():
            who = "The view" if self._taker is None else "A task"
            raise RuntimeError(
                f"{who} reads request.stream by itself, and nothing else can read what"
                " it has read. Read the body with request.get_data() in the view before"
                " run(), or pass what the task needs."
            )


def share_body(request: Request) -> bool:
    """Let several threads ask for the body of a request, if it has one. Idempotent.

    :return: Whether it has one.
    """
    if not _has_body(request.environ):
        return False

    # Two threads may come at once, if both start the first task.
    if not isinstance(request, SharedBody):
        kept = vars(request)
        is_taken = "stream" in kept and "form" not in kept and not _is_kept(request)
        kept.setdefault(_LOCK, BodyLock(is_taken))
        _share_stream(request, kept.get("stream"))
        mix_in(request, SharedBody)

        # The view may have some of them in its hands.
        if "files" in kept:
            share_files(kept["files"])

    return True


def share_method(request: Request, task: t.Any) -> t.Any:
    """Replace a ``get_data`` that was looked up before the body was shared."""
    if look_up(task, "__self__") is not request:
        return task

    return request.get_data if task.__name__ == "get_data" else task


def _is_kept(request: Request) -> bool:
    """Return whether the body is there for all, as data or as a form."""
    is_parsed = "form" in vars(request) and request.mimetype in _FORMS
    return is_parsed or hasattr(request, "_cached_data")


def _share_stream(request: Request, stream: object) -> None:
    """Put a stream of the data where Werkzeug has left one that was read.

    It is at its end for the caller, and at the start for all others: what a task has
    read, the view can read by itself. Werkzeug replaces it when it parses the data.
    """
    kept = vars(request)

    if hasattr(request, "_cached_data") and not isinstance(stream, SharedFile):
        stream = SharedFile(io.BytesIO(Request.get_data(request)))
        stream.seek(0, os.SEEK_END)

    if isinstance(stream, SharedFile):
        kept["stream"] = stream


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
