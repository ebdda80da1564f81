"""The app of servers_app, for servers that bring an interpreter of their own."""

from __future__ import annotations

import atexit
import threading

from servers_app import app
from servers_app import note

from flask_apitask import run

__all__ = ["app"]

atexit.register(note, "exit")


@app.get("/inline")
def inline() -> str:
    """Tell whether a task runs on the thread of the request."""
    return str(run(threading.get_ident).result() == threading.get_ident())


if "NATIVE_WARM" in app.config:
    # Tasks, threads and a connection to the mail server, before a server forks.
    assert app.test_client().post("/mail/warm").text == "warm"
