from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
import typing as t

from werkzeug.datastructures import iter_multi_items

from .context import task_locals

if t.TYPE_CHECKING:
    import collections.abc as cabc


def _at_own_position(name: str) -> t.Any:
    """Make a method that calls one of the file's where the caller's task is in it."""

    def method(self: SharedFile, *args: t.Any) -> t.Any:
        with self._at_position() as file:
            return getattr(file, name)(*args)

    return method


class SharedFile(io.BufferedIOBase):
    """An upload in which each task has a position of its own, at first the start.

    It stands for the file that Werkzeug makes for it, and does all else as that does.
    """

    def __init__(self, file: t.Any) -> None:
        self._file = file
        # Guards the file's own position, which is that of whoever has the lock.
        self._lock = threading.Lock()
        # Where the view is.
        self._position: int = file.tell()

    @contextlib.contextmanager
    def _at_position(self) -> cabc.Iterator[t.Any]:
        task = task_locals.get()

        with self._lock:
            self._file.seek(self._position if task is None else task.get(self, 0))

            try:
                yield self._file
            finally:
                if task is None:
                    self._position = self._file.tell()
                else:
                    task[self] = self._file.tell()

    read: t.Any = _at_own_position("read")
    read1: t.Any = _at_own_position("read")
    readline: t.Any = _at_own_position("readline")
    tell: t.Any = _at_own_position("tell")
    truncate: t.Any = _at_own_position("truncate")
    write: t.Any = _at_own_position("write")

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        with self._at_position() as file:
            # It returns nothing before Python 3.11.
            file.seek(offset, whence)
            return t.cast("int", file.tell())

    def fileno(self) -> int:
        return t.cast("int", self._file.fileno())

    def close(self) -> None:
        """Do nothing: text that is read from it closes it in the end, for all."""

    def close_for_all(self) -> None:
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
            upload.stream = SharedFile(stream)


def close_files(files: t.Any) -> None:
    """Close uploads at the end of their request."""
    for _, upload in iter_multi_items(files):
        if isinstance(upload.stream, SharedFile):
            upload.stream.close_for_all()
