from __future__ import annotations

import logging
import os
import sys
import traceback
import typing as t

if t.TYPE_CHECKING:
    from types import CodeType

    from flask import Flask

PACKAGE: t.Final = os.path.dirname(__file__) + os.sep
# Of the attributes that our records have. With it, they can't collide with those that
# the app's own record factory, filters or adapters set.
_PREFIX: t.Final = "apitask_"


def log(
    logger: t.Any,
    level: int,
    message: str,
    *args: object,
    error: BaseException | None = None,
    place: CodeType | None = None,
    **fields: object,
) -> None:
    """Log something, and never raise, whatever the app has done to its logging.

    If the logger is disabled or fails, the text is written to ``stderr`` instead, as
    :data:`logging.lastResort` does.

    :param logger: A logger, an adapter, or what another library has in its place.
    :param error: An exception, to be logged with its traceback.
    :param place: The code that the record is about, for its module and line. Without
        it, they are those that raised the error, or that called this package.
    :param fields: Attributes of the record, each of which gets the prefix ``apitask_``.
    """
    extra = {f"{_PREFIX}{name}": value for name, value in fields.items()}

    try:
        inner = logger

        while isinstance(inner, logging.LoggerAdapter):
            inner = inner.logger

        if _is_disabled(inner, level):
            cause = f"The logger {inner.name!r} is disabled."
        elif isinstance(inner, logging.Logger):
            if logger.isEnabledFor(level):
                where = _find_place(place, error)
                _handle(logger, level, message, args, error, where, extra)

            return
        else:
            _call(logger, level, message % args if args else message, error, extra)
            return
    except BaseException:
        cause = f"It could not be logged:\n{traceback.format_exc()}"

    try:
        record = logging.LogRecord("", level, "", 0, message, args, _info(error))
        sys.stderr.write(f"{logging.Formatter().format(record)}\n{cause}\n")
    except BaseException:
        # There is no place left to say it.
        return


def log_once(
    app: Flask, reason: str, message: str, *args: object, place: CodeType | None = None
) -> None:
    """Log a WARNING of an app, but not a second one for the same reason."""
    mark = object()

    # In one step, as several threads may come at once.
    if app.extensions.setdefault(f"apitask_warned_{reason}", mark) is mark:
        log(find_logger(app), logging.WARNING, message, *args, place=place)


def find_logger(app: Flask) -> t.Any:
    """Return the logger of an app, or Python's own one if a property there fails."""
    try:
        return app.logger
    except BaseException:
        return logging.getLogger(app.name)


def _is_disabled(logger: t.Any, level: int) -> bool:
    """Return whether a logger drops what its level would let through."""
    return (
        getattr(logger, "disabled", False) is True
        and level > logging.root.manager.disable
        and level >= logger.getEffectiveLevel()
    )


def _handle(
    logger: t.Any,
    level: int,
    message: str,
    args: tuple[object, ...],
    error: BaseException | None,
    place: tuple[str, int, str],
    extra: dict[str, object],
) -> None:
    """Have a record handled by a logger, with what its adapters make of it."""
    kwargs: t.Any = {"exc_info": _info(error), "extra": extra.copy()}
    text = message % args if args else message

    # Not by its log(), which may drop what is extra, or format in a style of its own.
    while isinstance(logger, logging.LoggerAdapter):
        message, kwargs = logger.process(text, kwargs)
        text, args, logger = message, (), logger.logger

    path, line, name = place
    made = logger.name, level, path, line, message, args, kwargs.get("exc_info")
    record = logger.makeRecord(*made, func=name)

    if args and record.getMessage() != text:
        # The app's own factory makes records that format in another style.
        record.msg, record.args = text, ()

    # Not by makeRecord(), which refuses names that the factory has set.
    vars(record).update({**extra, **(kwargs.get("extra") or {})})
    logger.handle(record)


def _call(
    logger: t.Any,
    level: int,
    text: str,
    error: BaseException | None,
    extra: dict[str, object],
) -> None:
    """Call the logger of another library."""
    method = logging.getLevelName(level).lower()

    # By the class, as a mock has an attribute of any name.
    if hasattr(type(logger), "opt"):
        # That is Loguru, which takes no exc_info.
        getattr(logger.bind(**extra).opt(exception=error), method)(text)
    elif hasattr(type(logger), "bind"):
        # That is structlog, which takes fields, but no extra.
        getattr(logger.bind(**extra), method)(text, exc_info=_info(error))
    else:
        getattr(logger, method)(text, exc_info=_info(error), extra=extra)


def _find_place(
    place: CodeType | None, error: BaseException | None
) -> tuple[str, int, str]:
    """Return the path, line and name of what a record is about."""
    if place is not None:
        return place.co_filename, place.co_firstlineno, place.co_name

    raised = traceback.walk_tb(None if error is None else error.__traceback__)

    # A thread begins in the standard library, so there is one.
    return next(
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in [*reversed([*raised]), *traceback.walk_stack(None)]
        if not frame.f_code.co_filename.startswith(PACKAGE)
    )


def _info(error: BaseException | None) -> t.Any:
    return None if error is None else (type(error), error, error.__traceback__)
