from __future__ import annotations

import io
import os
import tempfile
import threading
import typing as t

from werkzeug.datastructures import iter_multi_items

from .context import mix_in
from .context import task_locals

if t.TYPE_CHECKING:
    import typing_extensions as te

# The methods to replace on the file that Werkzeug made, which others may already hold.
_METHODS: t.Final = (
    *("close", "read", "read1", "readinto", "readline", "readlines"),
    *("seek", "tell", "truncate", "write"),
)


def _at_own_position(name: str) -> t.Any:
    """Make a method that calls the file's own at the position of the caller's task."""

    def method(self: SharedFile, *args: t.Any) -> t.Any:
        return self._call(name, *args)

    return method


class SharedFile(io.BufferedIOBase):
    """An upload in which each task has its own position, which is 0 at first.

    In all else it behaves like the file behind it: the one that Werkzeug made for the
    upload, or that of a cached body. Only :meth:`close` does nothing.
    """

    def __init__(self, file: t.Any) -> None:
        self._file = file
        # Guards the file's own position, which is the view's.
        self._lock = threading.Lock()

    def _call(self, name: str, *args: t.Any) -> t.Any:
        file, task = self._file, task_locals.get()
        # The class's methods: share_files() replaces those of the object.
        kind = type(file)

        with self._lock:
            if task is None:
                return getattr(kind, name)(file, *args)

            position = kind.tell(file)
            kind.seek(file, task.get(self, 0))

            try:
                return getattr(kind, name)(file, *args)
            finally:
                task[self] = kind.tell(file)
                kind.seek(file, position)

    read: t.Any = _at_own_position("read")
    read1: t.Any = _at_own_position("read")
    readline: t.Any = _at_own_position("readline")
    tell: t.Any = _at_own_position("tell")
    truncate: t.Any = _at_own_position("truncate")
    write: t.Any = _at_own_position("write")

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        # The file's seek() returns nothing before Python 3.11.
        self._call("seek", offset, whence)
        return t.cast("int", self.tell())

    def fileno(self) -> int:
        return t.cast("int", self._file.fileno())

    def close(self) -> None:
        """Do nothing: a text wrapper around the upload would close it for everybody."""

    def close_for_all(self) -> None:
        # The file's methods refer to this object: break that reference cycle.
        for name in _METHODS:
            vars(self._file).pop(name, None)

        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    seekable: t.Any = readable
    writable: t.Any = readable

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._file, name)


class ByLines:
    """A file that is iterated over with ``readline()``, even one set on the object."""

    readline: t.Any

    def __iter__(self) -> te.Self:
        return self

    def __next__(self) -> t.Any:
        line = self.readline()

        if not line:
            raise StopIteration

        return line


def share_files(files: t.Any) -> None:
    """Let several tasks read the same uploads."""
    for _, upload in iter_multi_items(files):
        stream = upload.stream

        # An app may have Werkzeug write uploads to files of its own. Leave those alone,
        # and closed ones.
        if isinstance(stream, tempfile.SpooledTemporaryFile) and not stream.closed:
            upload.stream = shared = SharedFile(stream)
            # The view may already hold the file, or a text wrapper around it.
            mix_in(stream, ByLines)
            vars(stream).update((name, getattr(shared, name)) for name in _METHODS)


def close_files(files: t.Any) -> None:
    """Close uploads at the end of their request."""
    for _, upload in iter_multi_items(files):
        if isinstance(upload.stream, SharedFile):
            upload.stream.close_for_all()
