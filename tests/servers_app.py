"""The app that real servers serve; it tells the tests what becomes of its tasks."""

from __future__ import annotations

import contextvars
import hashlib
import os
import socket
import threading
import typing as t

import flask
from flask import Flask
from flask_mail import Mail
from flask_mail import Message

from flask_apitask import ApiTask
from flask_apitask import run

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Seconds after which a task that nobody lets go on has failed.
PATIENCE: t.Final = 30.0
# A body that no socket buffers as a whole, in chunks.
CHUNK: t.Final = b"x" * 65536
CHUNKS: t.Final = 1024

app = Flask(__name__)
app.config.update(
    APITASK_MAIL_BACKGROUND=True,
    MAIL_DEFAULT_SENDER="app@example.com",
    MAIL_SERVER="127.0.0.1",
)
# FLASK_MAIL_PORT, FLASK_GATE_PORT, FLASK_JOURNAL and keys of the extension.
app.config.from_prefixed_env()
mail = Mail(app)
ApiTask(app)

colour = contextvars.ContextVar[str]("colour")
thread_bound = threading.local()


def note(line: str) -> None:
    """Write a line that the test can read at once."""
    journal = os.open(app.config["JOURNAL"], os.O_WRONLY | os.O_APPEND)

    try:
        os.write(journal, f"{line}\n".encode())
    finally:
        os.close(journal)


def pass_gate(name: str) -> None:
    """Tell the test that a task or view is here, and wait until it may pass."""
    gate = ("127.0.0.1", app.config["GATE_PORT"])

    with socket.create_connection(gate, PATIENCE) as connection:
        connection.sendall(f"{name}\n".encode())
        connection.recv(1)


def work(name: str) -> None:
    """Be done as soon as the test says so."""
    pass_gate(name)
    note(name)


def work_and_mail(name: str) -> None:
    """Be done as soon as the test says so, and send a mail then."""
    pass_gate(name)
    mail.send(Message(name, ["client@example.com"], "From a task."))
    note(name)


def fail() -> None:
    """Fail."""
    raise LookupError("on purpose")


def look_around(name: str) -> str:
    """Return what the task sees of its request while others are under way."""
    before = f"{colour.get()} {flask.request.path} {flask.current_app.name}"
    pass_gate(name)
    after = f"{colour.get()} {flask.request.path} {flask.current_app.name}"
    assert before == after, (before, after)
    return after


def leave_mark(name: str) -> dict[str, str]:
    """Leave something on the thread, and return what was there."""
    seen = vars(thread_bound).copy()
    thread_bound.owner = f"a task of {name}"
    return seen


def take_digest(name: str, read: cabc.Callable[[], bytes]) -> None:
    """Note the digest of what was uploaded."""
    note(f"{name} {hashlib.sha256(read()).hexdigest()}")


@app.get("/plain")
def plain() -> str:
    """Start no task."""
    return "plain"


@app.get("/process")
def process() -> str:
    """Tell which process answers."""
    return str(os.getpid())


@app.get("/note/<name>")
def noted(name: str) -> str:
    """Start a task that does not wait."""
    run(note, name)
    return name


@app.get("/work/<name>")
def worked(name: str) -> str:
    """Start a task that waits for the test."""
    run(work, name)
    return name


@app.get("/work-and-mail/<name>")
def worked_and_mailed(name: str) -> str:
    """Start a task that waits for the test, and sends a mail then."""
    run(work_and_mail, name)
    return name


@app.post("/mail/<name>")
def mailed(name: str) -> str:
    """Send two mails."""
    mail.send(Message(f"{name} 1", ["client@example.com"], "The first."))
    mail.send(Message(f"{name} 2", ["client@example.com"], "The second."))
    return name


@app.get("/stream/<name>")
def streamed(name: str) -> flask.Response:
    """Start a task in the middle of a stream."""

    def generate() -> cabc.Iterator[str]:
        yield "first\n"
        run(work, name)
        yield "last\n"

    return flask.Response(flask.stream_with_context(generate()))


@app.get("/large/<name>")
def large(name: str) -> flask.Response:
    """Start a task at the begin of a stream that is too large to be buffered."""

    def generate() -> cabc.Iterator[bytes]:
        try:
            yield CHUNK
            run(work, name)

            for _ in range(CHUNKS):
                yield CHUNK
        finally:
            note(f"{name} is left")

    return flask.Response(flask.stream_with_context(generate()))


@app.get("/fail/<name>")
def failed(name: str) -> str:
    """Start a task that fails, and one that does not."""
    run(fail)
    run(note, name)
    return name


@app.get("/error/<name>")
def broken(name: str) -> str:
    """Start a task, and fail."""
    run(work, name)
    raise RuntimeError(f"the view of {name} fails")


@app.get("/abort/<name>")
def aborted(name: str) -> str:
    """Start a task, and answer with an error page."""
    run(work, name)
    flask.abort(418)


@app.get("/look/<name>")
def looked(name: str) -> str:
    """Return what a task sees."""
    colour.set(name)
    return run(look_around, name).result()


@app.get("/isolated/<name>")
def isolated(name: str) -> dict[str, t.Any]:
    """Tell what is bound to the thread, for the view and for its tasks."""
    found = vars(thread_bound).copy()
    thread_bound.owner = name
    seen = [future.result() for future in [run(leave_mark, name) for _ in range(3)]]
    kept = vars(thread_bound).copy()
    vars(thread_bound).clear()
    return {"found": found, "seen": seen, "kept": kept}


@app.post("/form/<name>")
def uploaded(name: str) -> str:
    """Read a file of a form in a task."""
    run(take_digest, name, flask.request.files["file"].read)
    return name


@app.post("/body/<name>")
def sent(name: str) -> str:
    """Read the body itself in a task."""
    run(take_digest, name, flask.request.get_data)
    return name


if "WARM" in app.config:
    # Tasks, threads and a connection to the mail server, before a server forks.
    assert app.test_client().post("/mail/warm").text == "warm"
