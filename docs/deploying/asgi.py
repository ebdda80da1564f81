# WSGI_APP=shop:app uvicorn asgi:app --port 8080
from __future__ import annotations

import os
import pkgutil
import typing as t

from a2wsgi import WSGIMiddleware

# How many requests a process serves at once.
WORKERS = 8

wsgi_app = pkgutil.resolve_name(os.environ["WSGI_APP"])


def answer_when_done(environ: t.Any, start_response: t.Any) -> t.Any:
    """Start the response when the app has returned: its tasks are done by then.

    a2wsgi sends the headers as soon as the app has them. They are the whole response to
    a HEAD request, and wherever the body is empty.
    """
    started: list[t.Any] = []
    body = wsgi_app(environ, lambda *arguments: started.append(arguments))
    start_response(*started[-1])
    return body


app = WSGIMiddleware(answer_when_done, workers=WORKERS)
