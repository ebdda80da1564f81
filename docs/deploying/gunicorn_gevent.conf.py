# gunicorn --config gunicorn_gevent.conf.py --workers 2 shop:app
from __future__ import annotations

from gevent import monkey

# Patch before anything else is imported. The worker patches too, but with --preload
# that is too late: locks made before then block the whole worker.
monkey.patch_all()

worker_class = "gevent"
# Seconds that running requests have to finish when the server is stopped.
graceful_timeout = 30
