# gunicorn --config gunicorn_gthread.conf.py --workers 2 shop:app
from __future__ import annotations

worker_class = "gthread"
# Requests that a worker serves at once.
threads = 8
# Seconds that requests have to come to their end when the server is stopped.
graceful_timeout = 30
