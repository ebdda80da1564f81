from __future__ import annotations

import typing as t

from .. import routes
from .handover import route
from .mail import find_handover
from .state import CeleryState
from .worker import bind_names

if t.TYPE_CHECKING:
    from flask import Flask

    from ..config import Config


def use_celery(app: Flask, config: Config) -> None:
    """Send tasks of an app to Celery as its routes say.

    :raises ValueError: Two functions share a name that is routed to Celery.
    """
    bind_names(app, config.routes)
    app.extensions["apitask_celery"] = CeleryState(config)
    routes.router = route

    if "apitask_mail" in app.extensions:
        app.extensions["apitask_mail"].find_handover = find_handover
