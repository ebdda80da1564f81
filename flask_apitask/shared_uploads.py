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

# The attribute for the lock that guards a shared file's own position, the view's.
_LOCK: t.Final = "_flask_apitask_lock"


def _at_own_position(name: str) -> t.Any:
    """Make a method that calls the file's own at the position of the caller's task."""

    def method(self: SharedFile, *args: t.Any) -> t.Any:
        return self._call(name, *args)

    method.__name__ = name
    method.__qualname__ = f"SharedFile.{name}"
    return method


class SharedFile:
    """A file in which each task has its own position, which is 0 at first.

    Otherwise it behaves like the file that this class is mixed into, which others may
    already hold. But :meth:`close` does nothing, because a text wrapper would close the
    file for everybody. The end of the request closes it.
    """

    def _call(self, name: str, *args: t.Any) -> t.Any:
        file: t.Any = super()
        task = task_locals.get()

        with vars(self)[_LOCK]:
            if task is None:
                return getattr(file, name)(*args)

            position = file.tell()
            file.seek(task.get(self, 0))

            try:
                return getattr(file, name)(*args)
            finally:
                task[self] = file.tell()
                file.seek(position)

    # This may move the content of an upload from memory to disk.
    fileno: t.Any = _at_own_position("fileno")
    read: t.Any = _at_own_position("read")
    # An upload has no read1() before Python 3.11.
    read1: t.Any = _at_own_position("read")
    readline: t.Any = _at_own_position("readline")
    readlines: t.Any = _at_own_position("readlines")
    tell: t.Any = _at_own_position("tell")
    truncate: t.Any = _at_own_position("truncate")
    write: t.Any = _at_own_position("write")
    writelines: t.Any = _at_own_position("writelines")

    def readinto(self, buffer: t.Any) -> int:
        # An upload has no readinto() before Python 3.11.
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        # An upload's seek() returns nothing before Python 3.11.
        self._call("seek", offset, whence)
        return t.cast("int", self.tell())

    def __iter__(self) -> te.Self:
        return self

    def __next__(self) -> t.Any:
        line = self.readline()

        if not line:
            raise StopIteration

        return line

    def readable(self) -> bool:
        return True

    seekable: t.Any = readable
    writable: t.Any = readable

    def close(self, *error: object) -> None:
        """Do nothing."""

    __exit__: t.Any = close

    def close_for_all(self) -> None:
        file: t.Any = super()
        file.close()

    __del__: t.Any = close_for_all


class SharedBytes(SharedFile, io.BytesIO):
    """Data in memory, as a shared file."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        vars(self)[_LOCK] = threading.Lock()


def share_files(files: t.Any) -> None:
    """Let several tasks read the same uploads."""
    for _, upload in iter_multi_items(files):
        stream = upload.stream

        # An app may have Werkzeug write uploads to files of its own. Leave those alone,
        # and closed ones.
        if isinstance(stream, tempfile.SpooledTemporaryFile) and not stream.closed:
            vars(stream).setdefault(_LOCK, threading.Lock())
            mix_in(stream, SharedFile)


def close_files(files: t.Any) -> None:
    """Close uploads at the end of their request."""
    for _, upload in iter_multi_items(files):
        if isinstance(upload.stream, SharedFile):
            upload.stream.close_for_all()
