# gunicorn --config gunicorn_sync.conf.py --workers 4 shop:app
from __future__ import annotations

worker_class = "sync"
# Seconds after which a worker that is silent is killed. It is silent while it serves a
# request, so the longest request, with the wait for its tasks, must be shorter.
timeout = 30
# Seconds that requests have to come to their end when the server is stopped.
graceful_timeout = 30
