# gunicorn --config gunicorn_gthread.conf.py --workers 2 shop:app
from __future__ import annotations

worker_class = "gthread"
# How many requests a worker serves at once.
threads = 8
# Seconds that running requests have to finish when the server is stopped.
graceful_timeout = 30
