"""What a worker of Celery imports, in the order that Flask's documentation has."""

from __future__ import annotations

import celery_app as tested

flask_app = tested.create_app()
celery_app = flask_app.extensions["celery"]
