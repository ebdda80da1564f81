from __future__ import annotations

import contextlib
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import logging


def log(
    logger: logging.Logger,
    level: int,
    message: str,
    *args: object,
    exc_info: BaseException | None = None,
    extra: cabc.Mapping[str, object] | None = None,
) -> None:
    """Write a log record; whatever the app's logging does, nothing is raised."""
    with contextlib.suppress(Exception):
        logger.log(level, message, *args, exc_info=exc_info, extra=extra)
