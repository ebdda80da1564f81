"""The app of the servers' tests through a2wsgi, with nothing in between."""

from __future__ import annotations

import typing as t

from a2wsgi import WSGIMiddleware
from servers_app import app as wsgi_app

app = WSGIMiddleware(t.cast("t.Any", wsgi_app))
