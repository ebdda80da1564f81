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
# Prefixes the attributes of our records, so that they can't collide with those set by
# the app's own record factory, filters or adapters.
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
    """Log a message. Never raises, whatever the app has done to its logging.

    If the logger is disabled or fails, the text is written to ``stderr`` instead, as
    :data:`logging.lastResort` does.

    :param logger: A logger, an adapter, or another library's logger.
    :param error: An exception, to be logged with its traceback.
    :param place: The code that the record is about, for its path and line. The default
        is the code that raised the error, or that called this package.
    :param fields: Attributes of the record; each name gets the prefix ``apitask_``.
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
        cause = f"This could not be logged:\n{traceback.format_exc()}"

    try:
        record = logging.LogRecord("", level, "", 0, message, args, _info(error))
        sys.stderr.write(f"{logging.Formatter().format(record)}\n{cause}\n")
    except BaseException:
        # There is nowhere left to report it.
        return


def log_once(
    app: Flask, reason: str, message: str, *args: object, place: CodeType | None = None
) -> None:
    """Log a WARNING once per app and reason."""
    mark = object()

    # One atomic step, because several threads may get here at once.
    if app.extensions.setdefault(f"apitask_warned_{reason}", mark) is mark:
        log(find_logger(app), logging.WARNING, message, *args, place=place)


def find_logger(app: Flask) -> t.Any:
    """Return the app's logger, or a plain one if the ``logger`` property raises."""
    try:
        return app.logger
    except BaseException:
        return logging.getLogger(app.name)


def _is_disabled(logger: t.Any, level: int) -> bool:
    """Return whether a logger drops a record that its level would let through."""
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
    """Let a logger handle a record, as processed by its adapters."""
    kwargs: t.Any = {"exc_info": _info(error), "extra": extra.copy()}
    text = message % args if args else message

    # Not with the adapter's log(): it may drop extras or format in its own style.
    while isinstance(logger, logging.LoggerAdapter):
        message, kwargs = logger.process(text, kwargs)
        text, args, logger = message, (), logger.logger

    path, line, name = place
    made = logger.name, level, path, line, message, args, kwargs.get("exc_info")
    record = logger.makeRecord(*made, func=name)

    if args and record.getMessage() != text:
        # The records of the app's own factory format in another style.
        record.msg, record.args = text, ()

    # Not with makeRecord(): it refuses names that the factory has set.
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

    # Ask the class, because a mock has every attribute.
    if hasattr(type(logger), "opt"):
        # Loguru takes no exc_info.
        getattr(logger.bind(**extra).opt(exception=error), method)(text)
    elif hasattr(type(logger), "bind"):
        # structlog takes fields, but no extra.
        getattr(logger.bind(**extra), method)(text, exc_info=_info(error))
    else:
        getattr(logger, method)(text, exc_info=_info(error), extra=extra)


def _find_place(
    place: CodeType | None, error: BaseException | None
) -> tuple[str, int, str]:
    """Return the path, line and function name that a record is about."""
    if place is not None:
        return place.co_filename, place.co_firstlineno, place.co_name

    raised = traceback.walk_tb(None if error is None else error.__traceback__)

    # Every thread begins in the standard library, so one frame always matches.
    return next(
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in [*reversed([*raised]), *traceback.walk_stack(None)]
        if not frame.f_code.co_filename.startswith(PACKAGE)
    )


def _info(error: BaseException | None) -> t.Any:
    return None if error is None else (type(error), error, error.__traceback__)
