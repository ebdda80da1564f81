# python waitress_server.py --listen=127.0.0.1:8080 --threads=8 shop:app
from __future__ import annotations

import signal
import sys

from waitress.runner import run

# Ctrl-C stops waitress gracefully, but SIGTERM kills it in the middle of a request.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
run()
