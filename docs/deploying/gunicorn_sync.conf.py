# gunicorn --config gunicorn_sync.conf.py --workers 4 shop:app
from __future__ import annotations

worker_class = "sync"
# Seconds after which a silent worker is killed. A worker is silent while it serves a
# request, so the longest request, with the wait for its tasks, must be shorter.
timeout = 30
# Seconds that running requests have to finish when the server is stopped.
graceful_timeout = 30
