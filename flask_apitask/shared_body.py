from __future__ import annotations

import contextlib
import functools
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
from .shared_uploads import SharedBytes
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
    """A settable property, like Werkzeug's, that calls its function every time."""

    def __get__(self, request: t.Any, kind: t.Any = None) -> t.Any:
        return self if request is None else self.fget(request)  # type: ignore[misc]


class SharedBody(Request):
    """A request whose body several threads may read.

    Werkzeug reads the body on first access and caches the result. If two threads do
    this at once, each gets parts of the stream, and one of them waits for bytes that
    never come. Here, the first thread reads. The others wait for it, and then get the
    cached result, or the error that the first one got. All other ways to the body
    (``json``, ``data``, ``values``...) go through these four.
    """

    def get_data(
        self, cache: bool = True, as_text: t.Any = False, parse_form_data: bool = False
    ) -> t.Any:
        with vars(self)[_LOCK].reading(self):
            # Always cache, because the next thread may ask in another way.
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
    """Lets one thread at a time read a body, and remembers the outcome.

    :param is_taken: Whether the caller has taken the stream to read it directly.
    """

    def __init__(self, is_taken: bool) -> None:
        # Guards the stream and all that the request caches of it. The lock is held
        # while the client sends, so each body has its own.
        self._lock = threading.RLock()
        self._error: BaseException | None = None
        # The reader of the stream itself: None for the view, or the locals of a task.
        self._taker: object = task_locals.get() if is_taken else _NOBODY
        # Whether Werkzeug itself is asking for the stream.
        self._is_reading = False

    @contextlib.contextmanager
    def reading(self, request: Request, form: bool = False) -> cabc.Iterator[None]:
        """Let the caller read, unless that has failed already or can't succeed."""
        with self._lock:
            # For the form of a body that is not a form, nothing is read.
            if not form or request.mimetype in _FORMS:
                self._check()

            was_reading, self._is_reading = self._is_reading, True
            stream = vars(request).get("stream")

            try:
                # Parsing would use the body up for those who want the raw data.
                if request.mimetype == _URLENCODED:
                    Request.get_data(request)

                yield
            except BaseException as error:
                # The rest of a half-read stream must not pass for the whole body. A
                # body refused unread, for its length, may be asked for again.
                if "stream" in vars(request) and not _is_kept(request):
                    self._error = _copy(error)

                raise
            finally:
                self._is_reading = was_reading

            if not was_reading:
                _share_stream(request, stream)

    @contextlib.contextmanager
    def taking(self, request: Request) -> cabc.Iterator[None]:
        """Let the caller have the stream, which nothing else can read from then on."""
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
                f"{who} reads request.stream directly, so nothing else can read the"
                " body. Read the body with request.get_data() in the view before run(),"
                " or pass the task what it needs."
            )


def share_body(request: Request) -> bool:
    """Let several threads read the body of a request, if it has one. Idempotent.

    :return: Whether it has one.
    """
    if not _has_body(request.environ):
        return False

    # Two threads may get here at once, if both start the request's first task.
    if not isinstance(request, SharedBody):
        kept = vars(request)
        is_taken = "stream" in kept and "form" not in kept and not _is_kept(request)
        kept.setdefault(_LOCK, BodyLock(is_taken))
        _share_stream(request, kept.get("stream"))
        mix_in(request, SharedBody)

        # The view may already hold some of the uploads.
        if "files" in kept:
            share_files(kept["files"])

    return True


def share_method(request: Request, task: t.Any) -> t.Any:
    """Replace a method that was looked up before the body was shared.

    It is the request's ``get_data``, or one of an upload, perhaps in a partial.
    """
    # A subclass may do more when it is called.
    if type(task) is functools.partial:
        method = share_method(request, task.func)
        shared = functools.partial(method, *task.args, **task.keywords)
        vars(shared).update(vars(task))
        return shared

    owner, name = look_up(task, "__self__"), look_up(task, "__name__")

    if owner is request and name == "get_data":
        return request.get_data

    is_of_upload = issubclass(type(owner), SharedFile) and name in vars(SharedFile)
    return getattr(owner, str(name)) if is_of_upload else task


def _is_kept(request: Request) -> bool:
    """Return whether the body is cached for everybody, as data or as a form."""
    is_parsed = "form" in vars(request) and request.mimetype in _FORMS
    return is_parsed or hasattr(request, "_cached_data")


def _share_stream(request: Request, stream: object) -> None:
    """Put a shared stream of the cached data in place of the one that was read.

    For the caller it is at its end, for all others at its start, so what a task has
    read the view can still read. Werkzeug replaces the stream when it parses the data.
    """
    kept = vars(request)

    if hasattr(request, "_cached_data") and not isinstance(stream, SharedFile):
        stream = SharedBytes(Request.get_data(request))
        stream.seek(0, os.SEEK_END)

    if isinstance(stream, SharedFile):
        kept["stream"] = stream


def _has_body(environ: cabc.Mapping[str, t.Any]) -> bool:
    if environ.get("CONTENT_LENGTH", "") not in {"", "0"}:
        return True

    # Without a length, Werkzeug reads a body only if the server says that its stream
    # ends. Some servers say so for every request, and most requests have no body.
    return "wsgi.input_terminated" in environ and (
        environ["REQUEST_METHOD"] not in {"GET", "HEAD"}
        or "HTTP_TRANSFER_ENCODING" in environ
    )


def _copy(error: BaseException) -> BaseException:
    """Copy an exception without its traceback, which refers to the request."""
    copy = type(error).__new__(type(error), *error.args)
    vars(copy).update(vars(error))
    return copy
