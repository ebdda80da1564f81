from __future__ import annotations

import inspect
import smtplib
import typing as t


def find_patch(module: t.Any, name: str) -> str | None:
    """Name what stands in place of a class that sends, or of what it sends by.

    A function has the globals of its module, whatever it is called. That can be told at
    any time, so it does not matter who came first, and a patch may be undone.

    :param module: The module of the class, which imports :mod:`smtplib`.
    """
    if vars(module)["smtplib"] is not smtplib:
        return f"{module.__name__}.smtplib"

    return (
        find_in_class(module, name)
        or find_in_class(smtplib, "SMTP")
        or find_in_class(smtplib, "SMTP_SSL")
    )


def find_in_class(module: t.Any, name: str, ignored: str = "") -> str | None:
    """Name what stands in place of a class, or of a method other than the ignored."""
    cls = getattr(module, name)
    full_name = f"{module.__name__}.{name}"

    if not inspect.isclass(cls) or f"{cls.__module__}.{cls.__qualname__}" != full_name:
        return f"{full_name} (it is {cls!r})"

    for method, function in vars(cls).items():
        if callable(function) and method != ignored and not is_of(module, function):
            return f"{full_name}.{method}"

    return None


def is_of(module: t.Any, function: object) -> bool:
    """Tell whether a function was written in a module."""
    return getattr(function, "__globals__", None) is vars(module)
