from __future__ import annotations

import functools
import logging
import sys

_logger = logging.getLogger(__name__)


@functools.cache
def threads_go_on() -> bool:
    """Return whether threads of this process run while it serves no request.

    Before 2.0.27, uWSGI keeps Python's global lock between requests unless it is told
    otherwise. A thread freezes there until the next request comes, in the middle of
    what it does. If it is so, that is logged, once in the process.
    """
    # uWSGI puts it there itself: it is no module that can be found.
    server = sys.modules.get("uwsgi")

    if getattr(server, "has_threads", True):
        return True

    _logger.warning(
        "Tasks run one after the other on the thread of the request, as this uWSGI lets"
        " no other thread run. Add 'enable-threads = true' to its configuration."
    )
    return False
