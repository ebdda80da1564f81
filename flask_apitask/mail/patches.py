from __future__ import annotations

import smtplib
import socket
import types
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

_CLASSES = {"Connection", "EmailBackend", "SMTP", "SMTP_SSL"}


class Part(t.NamedTuple):
    """A module, class or function that takes part in sending mail."""

    path: tuple[str, ...]
    value: object
    is_changed: bool

    def __str__(self) -> str:
        shown = f" (it is {self.value!r})" if self.path[-1] in _CLASSES else ""
        return ".".join(self.path) + shown


def find_parts(module: t.Any, name: str) -> cabc.Iterator[Part]:
    """Yield a class that sends mail, and the library code that it sends through.

    :param module: The module of the class, which imports :mod:`smtplib`.
    """
    library = vars(module)["smtplib"]
    yield Part((module.__name__, "smtplib"), library, library is not smtplib)
    yield from find_in_class(module, name)
    yield from find_in_class(smtplib, "SMTP")
    yield from find_in_class(smtplib, "SMTP_SSL")
    library, connect = vars(smtplib)["socket"], socket.create_connection
    yield Part(("smtplib", "socket"), library, library is not socket)
    # Only a mock counts: another replacement, such as gevent's, makes real connections.
    # With autospec, it is a plain function, and the mock is its attribute "mock".
    mocks = {"unittest.mock", "mock.mock"}
    is_mock = hasattr(connect, "mock") or type(connect).__module__ in mocks
    yield Part(("socket", "create_connection"), connect, is_mock)


def find_in_class(module: t.Any, name: str, ignored: str = "") -> cabc.Iterator[Part]:
    """Yield a class, and its methods except the ignored one.

    A function keeps the globals of its own module, whatever its name. This can be
    checked at any time, so it does not matter whether a patch came before us, or
    whether it is undone later.
    """
    cls, path = getattr(module, name), (module.__name__, name)

    # A proxy pretends to be the object that it wraps, but type() tells.
    is_own = type(cls) is type and (cls.__module__, cls.__qualname__) == path
    yield Part(path, cls, not is_own)

    for method, function in vars(cls).items() if is_own else ():
        if callable(function) and method != ignored:
            yield Part((*path, method), function, not is_of(module, function))


def is_of(module: t.Any, function: object) -> bool:
    """Tell whether a function was written in a module."""
    return type(function) is types.FunctionType and function.__globals__ is vars(module)
