from __future__ import annotations

import inspect
import smtplib
import typing as t

import flask_mail


def find_change(mail: object, name: str, suppress: bool) -> str | None:
    """Name what somebody has put in place of something of Flask-Mail's, if it is so.

    A function has the globals of its module, whatever it is called. That can be told at
    any time, so it does not matter who came first, and a patch may be undone.

    :param name: ``"send"`` or ``"connect"``, of a ``Mail``.
    :param suppress: Nothing is to be sent, so it does not matter how.
    """
    if not _is_of(flask_mail, object.__getattribute__(mail, name)):
        return f"{type(mail).__name__}.{name}"

    if name == "send":
        # It calls connect().
        return None

    ignored = frozenset({"configure_host"} if suppress else ())
    change = _find_in_class(flask_mail, "Connection", ignored)

    if change is None and not suppress:
        if vars(flask_mail)["smtplib"] is not smtplib:
            return "flask_mail.smtplib"

        change = _find_in_class(smtplib, "SMTP") or _find_in_class(smtplib, "SMTP_SSL")

    return change


def _find_in_class(
    module: t.Any, name: str, ignored: frozenset[str] = frozenset()
) -> str | None:
    cls = getattr(module, name)
    full_name = f"{module.__name__}.{name}"

    if not inspect.isclass(cls) or f"{cls.__module__}.{cls.__qualname__}" != full_name:
        return f"{full_name} (it is {cls!r})"

    for method, function in vars(cls).items():
        if callable(function) and not (method in ignored or _is_of(module, function)):
            return f"{full_name}.{method}"

    return None


def _is_of(module: t.Any, function: object) -> bool:
    return getattr(function, "__globals__", None) is vars(module)
