from __future__ import annotations

import io
import os
import tempfile
import threading
import typing as t

from werkzeug.datastructures import iter_multi_items

from .context import task_locals

# What is asked of an upload, by whoever has the file that Werkzeug has made.
_METHODS: t.Final = (
    *("close", "read", "read1", "readinto", "readline", "readlines"),
    *("seek", "tell", "truncate", "write"),
)


def _at_own_position(name: str) -> t.Any:
    """Make a method that calls one of the file's where the caller's task is in it."""

    def method(self: SharedFile, *args: t.Any) -> t.Any:
        return self._call(name, *args)

    return method


class SharedFile(io.BufferedIOBase):
    """An upload in which each task has a position of its own, at first the start.

    It stands for the file that Werkzeug makes for it, and does all else as that does.
    """

    def __init__(self, file: t.Any) -> None:
        self._file = file
        # Guards the file's own position, which is the view's.
        self._lock = threading.Lock()

    def _call(self, name: str, *args: t.Any) -> t.Any:
        file, task = self._file, task_locals.get()
        # By the class, as an upload has other methods of its own.
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
        # It returns nothing before Python 3.11.
        self._call("seek", offset, whence)
        return t.cast("int", self.tell())

    def fileno(self) -> int:
        return t.cast("int", self._file.fileno())

    def close(self) -> None:
        """Do nothing: text that is read from it closes it in the end, for all."""

    def close_for_all(self) -> None:
        # No cycle through the file.
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


def share_files(files: t.Any) -> None:
    """Let several tasks read the same uploads."""
    for _, upload in iter_multi_items(files):
        stream = upload.stream

        # An app may have Werkzeug write uploads to other files. Those are left alone,
        # and so is one that is closed.
        if isinstance(stream, tempfile.SpooledTemporaryFile) and not stream.closed:
            upload.stream = shared = SharedFile(stream)
            # The view may have it in its hands, or a text of it.
            vars(stream).update((name, getattr(shared, name)) for name in _METHODS)


def close_files(files: t.Any) -> None:
    """Close uploads at the end of their request."""
    for _, upload in iter_multi_items(files):
        if isinstance(upload.stream, SharedFile):
            upload.stream.close_for_all()
