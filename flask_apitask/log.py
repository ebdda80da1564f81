from __future__ import annotations

import logging
import sys
import traceback
import typing as t

if t.TYPE_CHECKING:
    from types import CodeType

    from flask import Flask

# Of the attributes that our records have. With it, they can't collide with those that
# the app's own record factory, filters or adapters set.
_PREFIX: t.Final = "apitask_"


def log(
    logger: logging.Logger,
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

    :param error: An exception, to be logged with its traceback.
    :param place: What the record names as its module and line: the code that it is
        about, not the one that logs.
    :param fields: Attributes of the record, each of which gets the prefix ``apitask_``.
    """
    info = None if error is None else (type(error), error, error.__traceback__)
    extra = {f"{_PREFIX}{name}": value for name, value in fields.items()}

    try:
        # Other objects may stand in the place of a logger: adapters have no such flag.
        disabled = getattr(getattr(logger, "logger", logger), "disabled", False)

        if disabled and level >= logger.getEffectiveLevel():
            cause = f"The logger {logger.name!r} is disabled.\n"
        elif not logger.isEnabledFor(level):
            return
        elif place is None or not isinstance(logger, logging.Logger):
            logger.log(level, message, *args, exc_info=info, extra=extra, stacklevel=2)
            return
        else:
            path, line, name = place.co_filename, place.co_firstlineno, place.co_name
            made = (logger.name, level, path, line, message, args, info)
            logger.handle(logger.makeRecord(*made, func=name, extra=extra))
            return
    except BaseException:
        cause = f"It could not be logged:\n{traceback.format_exc()}"

    record = logging.LogRecord("", level, "", 0, message, args, info)
    text = logging.Formatter().format(record)

    try:
        sys.stderr.write(f"{text}\n{cause}")
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
        log(app.logger, logging.WARNING, message, *args, place=place)
