# gunicorn --config gunicorn_gevent.conf.py --workers 2 shop:app
from __future__ import annotations

from gevent import monkey

# Before anything else is imported. The worker does it as well, but with --preload that
# is too late: locks that were made until then block the whole worker.
monkey.patch_all()

worker_class = "gevent"
# Seconds that requests have to come to their end when the server is stopped.
graceful_timeout = 30
