"""An app whose tasks and views read bodies, for real servers."""

from __future__ import annotations

import hashlib
import typing as t

from flask import Flask
from flask import request

from flask_apitask import ApiTask
from flask_apitask import run

LIMIT: t.Final = 60 * 2**20

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = LIMIT
ApiTask(app)


def read_json() -> int:
    """Return how long the item of an order is."""
    return len(request.get_json()["item"])


def read_data() -> str:
    """Return the digest of the body."""
    return hashlib.sha256(request.get_data()).hexdigest()


def read_upload() -> str:
    """Return the digest of the upload."""
    return hashlib.sha256(request.files["file"].read()).hexdigest()


def read_field() -> str:
    """Return a field of the form that the upload is in."""
    return request.form["colour"]


@app.post("/json")
def read_json_twice() -> list[int]:
    """Have two tasks read the body."""
    return [run(read_json).result(), run(read_json).result(), read_json()]


@app.post("/both")
def read_with_a_task() -> list[str]:
    """Read the body while a task does."""
    digest = run(read_data)
    return [read_data(), digest.result()]


@app.post("/late")
def leave_it_to_tasks() -> list[str]:
    """Leave the body to two tasks, and the view before they are done."""
    run(read_data)
    run(read_data)
    return []


@app.post("/upload")
def upload() -> list[str]:
    """Have tasks read a form with an upload, and read the upload, too."""
    field = run(read_field)
    digests = [run(read_upload), run(read_upload)]
    return [read_upload(), *(digest.result() for digest in digests), field.result()]
