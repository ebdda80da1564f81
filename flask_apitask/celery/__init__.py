from __future__ import annotations

from .set_up import use_celery as use_celery
