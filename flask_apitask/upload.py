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
            self._file.seek(self._position if task is None else task.get(id(self), 0))

            try:
                yield self._file
            finally:
                if task is None:
                    self._position = self._file.tell()
                else:
                    task[id(self)] = self._file.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        with self._at_position() as file:
            return t.cast("bytes", file.read(-1 if size is None else size))

    read1 = read

    def readline(self, size: int | None = -1, /) -> bytes:
        with self._at_position() as file:
            return t.cast("bytes", file.readline(-1 if size is None else size))

    def truncate(self, size: int | None = None, /) -> int:
        with self._at_position() as file:
            return t.cast("int", file.truncate(size))

    def write(self, data: t.Any, /) -> int:
        with self._at_position() as file:
            return t.cast("int", file.write(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        with self._at_position() as file:
            file.seek(offset, whence)
            return t.cast("int", file.tell())

    def tell(self) -> int:
        with self._at_position() as file:
            return t.cast("int", file.tell())

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return t.cast("int", self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._file, name)


def share_files(files: t.Any) -> None:
    """Let several tasks read the same uploads."""
    for _, upload in iter_multi_items(files):
        # An app may have Werkzeug write uploads to other files. Those are left alone.
        if isinstance(upload.stream, tempfile.SpooledTemporaryFile):
            upload.stream = SharedFile(upload.stream)
