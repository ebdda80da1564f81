"""An app with Sentry, which patches the whole process, so it has one of its own.

It makes its requests itself, and prints what became of them as JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import typing as t
import weakref

import sentry_sdk
from flask import Flask
from sentry_sdk.transport import Transport

from flask_apitask import ApiTask
from flask_apitask import run

if t.TYPE_CHECKING:
    from sentry_sdk.envelope import Envelope

PATIENCE = 10.0


class KeptEvents(Transport):
    """Keeps what Sentry would be sent."""

    events: t.ClassVar[list[t.Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.events.append(envelope.get_event())


class Environ(dict[str, t.Any]):
    """A WSGI environ, with the request's body, that can be referred to weakly."""


sentry_sdk.init("http://key@127.0.0.1:9/1", transport=KeptEvents)
app = Flask("shop")
ApiTask(app)
environs: list[weakref.ref[Environ]] = []
inner = app.wsgi_app


def note_environ(environ: dict[str, t.Any], start_response: t.Any) -> t.Any:
    """Serve a request whose environ is looked after."""
    noted = Environ(environ)
    environs.append(weakref.ref(noted))
    return inner(noted, start_response)


app.wsgi_app = note_environ  # type: ignore[method-assign]


@app.post("/name")
def name() -> str:
    """Return the name of the thread that a task has."""
    return run(lambda: threading.current_thread().name).result(PATIENCE)


@app.get("/fails")
def fails() -> str:
    """Have a task fail."""
    run(divmod, 1, 0)
    return "ok"


@app.get("/fails/asked")
def asked() -> str:
    """Have a task fail, and ask for its result."""
    return type(run(divmod, 1, 0).exception(PATIENCE)).__name__


client = app.test_client()
# Sentry starts threads of its own in the first request, and keeps that.
client.get("/missing").close()
environs.clear()
threads = [client.post("/name", data=b"x" * 1000).text for _ in range(3)]
# A client keeps its last request.
client = app.test_client()
gc.collect()
alive = [environ() is not None for environ in environs]

for path in ("/fails", "/fails/asked"):
    client.get(path).close()

events = [
    (event["request"]["url"], event["exception"]["values"][-1]["type"])
    for event in KeptEvents.events
]
json.dump({"threads": threads, "alive": alive, "events": events}, sys.stdout)
