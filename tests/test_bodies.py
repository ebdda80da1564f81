from __future__ import annotations

import collections
import contextlib
import functools
import gc
import hashlib
import http.client
import io
import json
import random
import socket
import tempfile
import threading
import typing as t
import weakref

import flask
import pytest
import wsgi_servers_native  # noqa: F401
from bodies_app import LIMIT
from conftest import PATIENCE
from flask import Flask
from flask import request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.test import create_environ
from werkzeug.wrappers import Response
from wsgi_servers import KINDS
from wsgi_servers import serve

from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import task_started
from flask_apitask.context import MERGED

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory
    from werkzeug.datastructures import FileStorage

# Seconds in which a second reader would be here, if nothing kept it away.
MOMENT = 0.1
BOUNDARY = "b0undary"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
URLENCODED = "application/x-www-form-urlencoded"
EMPTY = hashlib.sha256(b"").hexdigest()
# The others hand no app a body that comes in chunks.
CHUNKED = ["gunicorn-gthread", "gunicorn-gevent", "waitress", "werkzeug", "granian"]
CONCURRENT = [kind for kind in KINDS if KINDS[kind].concurrent]


class Wire(io.RawIOBase):
    """What a server reads a body from, while the client still sends it.

    Each read gives a part of the body. So two readers get different parts of it.

    :param end: Raised in place of the end of the body.
    :param readers: Before it gives the first part, it lets so many come.
    """

    def __init__(
        self, body: bytes, end: type[Exception] | None = None, readers: int = 1
    ) -> None:
        self._body = io.BytesIO(body)
        self._part = len(body) // 8 + 1
        self._end = end
        self._expected = readers
        self.came = threading.Condition()
        self.readers: set[int] = set()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: t.Any) -> int:
        with self.came:
            first = not self.readers
            self.readers.add(threading.get_ident())
            self.came.notify_all()

            if first:
                self.came.wait_for(lambda: len(self.readers) >= self._expected, MOMENT)

            part = self._body.read(min(self._part, len(buffer)))

        if not part and self._end is not None:
            raise self._end("broken off")

        buffer[: len(part)] = part
        return len(part)


def make_fields(*values: str) -> bytes:
    """Make a form of fields, as a browser sends it."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="colour"\r\n\r\n'
    fields = "".join(f"{head}{value}\r\n" for value in values)
    return f"{fields}--{BOUNDARY}--\r\n".encode()


def make_multipart(content: bytes) -> bytes:
    """Make a form with a file in it."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file";'
        ' filename="a.bin"\r\n\r\n'
    )
    return head.encode() + content + b"\r\n" + make_fields("blue")


def read_json() -> object:
    """Read the body as JSON."""
    return request.get_json()


def read_form() -> object:
    """Read the fields of the form."""
    return request.form.to_dict()


def read_files() -> object:
    """Read the files of the form."""
    return [(name, file.filename) for name, file in request.files.items()]


class Case(t.NamedTuple):
    """A body, a way to ask for it, and the expected answer."""

    read: cabc.Callable[[], object]
    kind: str
    body: bytes
    whole: object


ORDER = {"item": "pen", "note": "x" * 5000}
CASES = {
    "get_json": Case(read_json, "application/json", json.dumps(ORDER).encode(), ORDER),
    "json": Case(
        lambda: request.json, "application/json", json.dumps(ORDER).encode(), ORDER
    ),
    "data": Case(lambda: request.data, "text/plain", b"x" * 5000, b"x" * 5000),
    "get_data": Case(
        lambda: request.get_data(), URLENCODED, b"a=" + b"x" * 5000, b"a=" + b"x" * 5000
    ),
    "form": Case(
        read_form, URLENCODED, b"a=1&b=" + b"x" * 99, {"a": "1", "b": "x" * 99}
    ),
    "multipart": Case(
        read_form, MULTIPART, make_multipart(b"y" * 5000), {"colour": "blue"}
    ),
    "files": Case(
        read_files, MULTIPART, make_multipart(b"y" * 5000), [("file", "a.bin")]
    ),
    "values": Case(
        lambda: request.values.to_dict(), URLENCODED, b"a=1", {"a": "1", "q": "2"}
    ),
}


def post(app: Flask, body: Wire, kind: str, length: int | None) -> Response:
    """Send a body, in chunks where its length is not told."""
    environ = create_environ("/?q=2", method="POST")
    environ.update({"CONTENT_TYPE": kind, "wsgi.input": body})

    if length is None:
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
        environ["wsgi.input_terminated"] = True
    else:
        environ["CONTENT_LENGTH"] = str(length)

    return Response.from_app(app, environ, buffered=True)


def add_readers(app: Flask, who: str, read: cabc.Callable[[], object]) -> list[object]:
    """Add a view that has a body read twice at once, and return where results go."""
    found: list[object] = []
    both = threading.Barrier(2)

    def ask() -> object:
        both.wait(PATIENCE)

        try:
            return read()
        except Exception as error:
            return type(error), str(error)

    @app.post("/")
    def index() -> str:
        first = run(ask)

        if who == "tasks":
            found.append(run(ask).result(PATIENCE))
        else:
            found.append(ask())

        found.append(first.result(PATIENCE))
        return "ok"

    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("who", ["tasks", "task-and-view"])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_two_ask_for_at_once(
    make_app: AppFactory, name: str, who: str, chunked: bool
) -> None:
    """Everybody gets the whole body, even if all ask while the client sends it."""
    read, kind, body, whole = CASES[name]
    app = make_app()
    found = add_readers(app, who, read)
    wire = Wire(body, readers=2)

    assert (
        post(app, wire, kind, None if chunked else len(body)).get_data(as_text=True)
        == "ok"
    )
    assert found == [whole, whole]
    assert len(wire.readers) == 1


@pytest.mark.parametrize("method", ["get_data", "get_json"])
def test_method_of_the_request_as_a_task(make_app: AppFactory, method: str) -> None:
    """A method that was looked up before the first task shares the body too."""
    app = make_app()
    body = json.dumps(ORDER).encode()
    wire = Wire(body, readers=2)

    @app.post("/")
    def index() -> str:
        read = getattr(request, method)
        tasks = [run(read), run(read), run(getattr(request, method))]
        found = [*(task.result(PATIENCE) for task in tasks), getattr(request, method)()]
        assert found == [body if method == "get_data" else ORDER] * 4
        return "ok"

    assert post(app, wire, "application/json", len(body)).data == b"ok"
    assert len(wire.readers) == 1


def test_form_and_files_at_once(make_app: AppFactory) -> None:
    """Fields and uploads of one body are parsed once, whoever asks for which."""
    app = make_app()
    answers = collections.deque([read_form, read_files])
    found = add_readers(app, "tasks", lambda: answers.popleft()())
    body = make_multipart(b"y" * 5000)

    assert (
        post(app, Wire(body, readers=2), MULTIPART, len(body)).get_data(as_text=True)
        == "ok"
    )
    assert {str(answer) for answer in found} == {
        "{'colour': 'blue'}",
        "[('file', 'a.bin')]",
    }


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize(
    ("read", "kind"),
    [(lambda: request.get_data(), "text/plain"), (read_form, MULTIPART)],
)
def test_client_that_goes_away(
    make_app: AppFactory,
    read: cabc.Callable[[], object],
    kind: str,
    limited: bool,
) -> None:
    """Whoever asks for a body that breaks off gets the error, and none gets a part."""
    app = make_app()
    found = add_readers(app, "tasks", read)
    body = make_fields("blue" * 1000)
    wire = Wire(body[:3000], end=TimeoutError, readers=2)

    assert (
        post(app, wire, kind, len(body) if limited else None).get_data(as_text=True)
        == "ok"
    )
    assert found[0] == found[1]
    assert isinstance(found[0], tuple)
    assert found[0][0].__name__ == ("ClientDisconnected" if limited else "TimeoutError")
    assert len(wire.readers) == 1


class SmallForms(flask.Request):
    """A request class that takes only one field. Flask 3.0 has no key for it."""

    max_form_parts = 1


@pytest.mark.parametrize("limit", ["body", "fields"])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_is_too_large(
    make_app: AppFactory, limit: str, chunked: bool
) -> None:
    """A limit of the app holds, and its 413 is for everybody who asks."""
    app = make_app()

    if limit == "body":
        app.config["MAX_CONTENT_LENGTH"] = 1000
    else:
        app.request_class = SmallForms

    found = add_readers(app, "task-and-view", read_form)
    body = make_fields("blue", "b" * 5000)
    post(app, Wire(body, readers=2), MULTIPART, None if chunked else len(body))

    assert found == [(RequestEntityTooLarge, str(RequestEntityTooLarge()))] * 2


def test_413_that_goes_to_the_client(make_app: AppFactory) -> None:
    """A view that reads a body that is too large answers 413, whatever a task did."""
    app = make_app(MAX_CONTENT_LENGTH=1000)

    @app.post("/")
    def index() -> str:
        assert isinstance(run(read_json).exception(PATIENCE), RequestEntityTooLarge)
        return str(request.get_json())

    body = json.dumps(ORDER).encode()
    assert post(app, Wire(body), "application/json", len(body)).status_code == 413


@pytest.mark.skipif(
    flask.Request.max_content_length.fset is None,  # type: ignore[attr-defined]
    reason="this Flask has no limit of a request's own",
)
def test_limit_that_is_raised(make_app: AppFactory) -> None:
    """A body that was refused for its length, unread, can be asked for again."""
    app = make_app(MAX_CONTENT_LENGTH=1000)
    body = b"x" * 5000

    @app.post("/")
    def index() -> bytes:
        refusal = run(request.get_data).exception(PATIENCE)
        assert isinstance(refusal, RequestEntityTooLarge)
        request.max_content_length = 10_000
        return request.get_data()

    assert post(app, Wire(body), "text/plain", len(body)).data == body


def test_json_that_is_none(make_app: AppFactory) -> None:
    """Everybody gets the 400 of a body that is not JSON."""
    app = make_app()
    found = add_readers(app, "task-and-view", read_json)

    assert (
        post(app, Wire(b"{" * 99, readers=2), "application/json", 99).get_data(
            as_text=True
        )
        == "ok"
    )
    assert found[0] == found[1]
    assert "400 Bad Request" in str(found[0])


def test_view_that_reads_the_stream(make_app: AppFactory) -> None:
    """A view may read the stream bit by bit, and start a task for each."""
    app = make_app()
    lengths: list[int] = []

    @app.post("/")
    def index() -> str:
        run(lengths.append, 0)

        while bit := request.stream.read(1000):
            run(lengths.append, len(bit))

        return "ok"

    assert (
        post(app, Wire(b"x" * 5000), "text/plain", 5000).get_data(as_text=True) == "ok"
    )
    assert sum(lengths) == 5000
    assert len(lengths) > 5


READ_BY = "{} reads request.stream directly"
REMEDY = "Read the body with request.get_data() in the view before run()"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_stream_that_the_view_reads_by_itself(
    make_app: AppFactory, name: str, when: str, chunked: bool
) -> None:
    """A task that asks for such a body gets an error that says what to do."""
    read, kind, body, _ = CASES[name]
    app = make_app()
    errors: list[str] = []

    @app.post("/")
    def index() -> bytes:
        if when == "after":
            run(int)

        start = request.stream.read(2)
        errors.extend(str(run(read).exception(PATIENCE)) for _ in range(2))
        stream = run(lambda: request.stream).exception(PATIENCE)
        return start + request.stream.read() + str(stream).encode()

    length = None if chunked else len(body)
    answer = post(app, Wire(body), kind, length).get_data()
    assert answer.startswith(body + READ_BY.format("The view").encode())
    assert len(errors) == 2
    assert all(READ_BY.format("The view") in error for error in errors)
    assert all(REMEDY in error for error in errors)


def test_rest_of_a_stream_passes_for_nothing(make_app: AppFactory) -> None:
    """What a view gets after it has read a part of the stream is for it alone."""
    app = make_app()

    @app.post("/")
    def index() -> bytes:
        start = request.stream.read(2)
        assert isinstance(run(request.get_data).exception(PATIENCE), RuntimeError)
        rest = request.get_data()
        assert request.get_data() == rest
        assert isinstance(run(request.get_data).exception(PATIENCE), RuntimeError)
        return start + b"|" + rest

    assert post(app, Wire(b"x" * 99), "text/plain", 99).data == b"xx|" + b"x" * 97


def test_stream_that_a_task_reads_by_itself(make_app: AppFactory) -> None:
    """A task may have it, too, and then it is the view that gets the error."""
    app = make_app()

    def read() -> bytes:
        return b"".join(iter(lambda: request.stream.read(10), b""))

    @app.post("/")
    def index() -> bytes:
        whole = run(read).result(PATIENCE)

        with pytest.raises(RuntimeError, match=READ_BY.format("A task")):
            request.get_data()

        with pytest.raises(RuntimeError, match=READ_BY.format("A task")):
            request.stream  # noqa: B018

        return whole

    assert post(app, Wire(b"x" * 99), "text/plain", 99).data == b"x" * 99


def test_stream_after_the_body_was_read(make_app: AppFactory) -> None:
    """It is at its end for the one who read the body, and whole for all others."""
    app = make_app()

    def read() -> bytes:
        return request.stream.read(9) + request.stream.read()

    def read_twice() -> tuple[bytes, bytes]:
        return request.get_data(), request.stream.read()

    @app.post("/<who>")
    def index(who: str) -> str:
        if who == "view-before":
            request.get_data()

        run(int)

        if who == "view":
            request.get_data()
        elif who == "task":
            assert run(read_twice).result(PATIENCE) == (body, b"")

        start = request.stream.read(9)
        # Werkzeug parses what it has kept, by way of another stream.
        assert run(read_form).result(PATIENCE) == {"a": "x" * 97}
        assert [run(read).result(PATIENCE) for _ in range(2)] == [body] * 2
        whole = start + request.stream.read()
        assert request.get_data() == body
        return whole.decode()

    body = b"a=" + b"x" * 97
    client = app.test_client()

    for who, whole in [("view-before", b""), ("view", b""), ("task", body)]:
        assert client.post(f"/{who}", data=body, content_type=URLENCODED).data == whole


def test_stream_while_a_task_reads_the_body(make_app: AppFactory) -> None:
    """A view that comes for the stream in the middle waits, and gets the whole."""
    app = make_app()
    wire = Wire(b"x" * 5000, readers=2)

    @app.post("/")
    def index() -> bytes:
        task = run(request.get_data)

        with wire.came:
            assert wire.came.wait_for(lambda: wire.readers, PATIENCE)

        whole = request.stream.read()
        assert task.result(PATIENCE) == whole
        return whole

    assert post(app, wire, "text/plain", 5000).data == b"x" * 5000
    assert len(wire.readers) == 1


@pytest.mark.parametrize("kind", ["application/octet-stream", MULTIPART])
def test_stream_of_which_the_form_was_asked(make_app: AppFactory, kind: str) -> None:
    """A body that is not a form has no fields; a parsed form has them for everybody."""
    app = make_app()
    body = make_fields("blue")
    form = {} if kind != MULTIPART else {"colour": "blue"}

    @app.post("/")
    def index() -> bytes:
        # As CSRF protection does.
        if kind == MULTIPART:
            assert read_form() == form

        run(int)
        start = request.stream.read(9)
        assert run(read_form).result(PATIENCE) == form
        assert run(read_files).result(PATIENCE) == []
        return start + request.stream.read()

    assert post(app, Wire(body), kind, len(body)).data == (b"" if form else body)


def test_form_looked_at_before_the_body_is_read(make_app: AppFactory) -> None:
    """A body that is not a form is still there after somebody asked for the form."""
    app = make_app()

    @app.post("/")
    def index() -> list[object]:
        return [read_form(), run(read_json).result(PATIENCE), read_form(), read_json()]

    body = json.dumps(ORDER).encode()
    answer = post(app, Wire(body), "application/json", len(body))
    assert json.loads(answer.data) == [{}, ORDER, {}, ORDER]


def test_stream_that_is_refused(make_app: AppFactory) -> None:
    """A view that is refused the stream, for the body's length, has not read it."""
    app = make_app(MAX_CONTENT_LENGTH=10)

    @app.post("/")
    def index() -> str:
        run(int)

        with pytest.raises(RequestEntityTooLarge):
            request.stream  # noqa: B018

        error = run(request.get_data).exception(PATIENCE)
        return type(error).__name__

    answer = post(app, Wire(b"x" * 99), "text/plain", 99)
    assert answer.data == b"RequestEntityTooLarge"


@pytest.mark.parametrize("name", ["form", "files", "stream"])
def test_request_that_the_view_changes(make_app: AppFactory, name: str) -> None:
    """Attributes of a request can still be set when tasks share it."""
    app = make_app()

    @app.post("/")
    def index() -> str:
        run(int)
        setattr(request, name, value := io.BytesIO())
        assert getattr(request, name) is value
        return "ok"

    assert post(app, Wire(b"a=1"), URLENCODED, 3).data == b"ok"


WAYS: dict[str, cabc.Callable[[], object]] = {
    "get_data": lambda: request.get_data(),
    "as_text": lambda: request.get_data(as_text=True).encode(),
    "uncached": lambda: request.get_data(cache=False),
    "parsed": lambda: request.get_data(parse_form_data=True),
    "positional": lambda: request.get_data(False, False, True),
    "data": lambda: request.data,
    "form": lambda: request.form.to_dict(),
    "files": lambda: request.files.to_dict(),
    "values": lambda: request.values.to_dict(),
    "json": lambda: request.get_json(force=True, silent=True, cache=False),
}


@pytest.mark.parametrize("kind", [URLENCODED, "text/plain", "application/json"])
@pytest.mark.parametrize("first", WAYS)
def test_ways_to_a_body_in_all_orders(
    make_app: AppFactory, kind: str, first: str
) -> None:
    """What a caller gets does not depend on who read the body before, or how."""
    app = make_app()
    is_form, is_json = kind == URLENCODED, kind == "application/json"
    body = b'{"a": 1}' if is_json else b"a=1"
    form = {"a": "1"} if is_form else {}
    whole: dict[str, object] = dict.fromkeys(WAYS, body)
    whole |= {"form": form, "files": {}, "values": {"q": "2"} | form}
    whole["json"] = json.loads(body) if is_json else None
    second = iter(WAYS)

    @app.post("/")
    def index() -> str:
        run(int)
        ways = [first, next(second)]
        assert [run(WAYS[way]).result(PATIENCE) for way in ways] == [
            whole[way] for way in ways
        ]
        assert [WAYS[way]() for way in ways] == [whole[way] for way in ways]
        return "ok"

    for _ in WAYS:
        assert post(app, Wire(body), kind, len(body)).data == b"ok"


def test_data_of_a_form_with_uploads(make_app: AppFactory) -> None:
    """It is kept for those who ask before the form is parsed, as in Werkzeug."""
    app = make_app()
    body = make_multipart(b"y" * 99)

    @app.post("/<first>")
    def index(first: str) -> str:
        run(int)
        run(WAYS[first]).result(PATIENCE)
        assert run(read_form).result(PATIENCE) == {"colour": "blue"}
        return str(request.get_data() == body)

    client = app.test_client()
    answers = {
        first: client.post(f"/{first}", data=body, content_type=MULTIPART).text
        for first in ("get_data", "uncached", "form", "data")
    }
    assert answers == {
        "get_data": "True",
        "uncached": "True",
        "form": "False",
        "data": "False",
    }


def test_form_that_fails_when_the_data_is_there(make_app: AppFactory) -> None:
    """A form with too many fields is refused; the data that was read before is not."""
    app = make_app()
    app.request_class = SmallForms
    body = make_fields("blue", "red")

    @app.post("/")
    def index() -> bytes:
        run(request.get_data).result(PATIENCE)

        for _ in range(2):
            error = run(read_form).exception(PATIENCE)
            assert isinstance(error, RequestEntityTooLarge)

        return request.get_data()

    assert post(app, Wire(body), MULTIPART, len(body)).data == body


def test_request_without_tasks_is_werkzeugs(make_app: AppFactory) -> None:
    """Where nothing is shared, parsing a form leaves no data, as in Werkzeug."""
    app = make_app()

    @app.post("/")
    def index() -> list[object]:
        assert type(request._get_current_object()) is flask.Request  # type: ignore[attr-defined]
        return [read_form(), request.get_data(as_text=True)]

    assert json.loads(post(app, Wire(b"a=1"), URLENCODED, 3).data) == [{"a": "1"}, ""]


class OwnRequest(flask.Request):
    """A request class of an app's own, in which a body is never empty."""

    __slots__ = ("seen",)

    def get_data(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        return super().get_data(*args, **kwargs) + b"!"


@pytest.mark.parametrize("when", ["before", "after"])
def test_request_class_of_the_app(make_app: AppFactory, when: str) -> None:
    """The app's own request class is used, whenever the app was given it."""
    app = make_app()
    kinds: list[object] = []

    @app.before_request
    def look() -> None:
        kinds.append(isinstance(request, OwnRequest))

    found = add_readers(app, "tasks", lambda: request.get_data())

    @app.after_request
    def look_again(response: flask.Response) -> flask.Response:
        kinds.append(isinstance(request, OwnRequest))
        kinds.append(type(request._get_current_object()).__name__)  # type: ignore[attr-defined]
        return response

    app.request_class = OwnRequest
    assert (
        post(app, Wire(b"x" * 99, readers=2), "text/plain", 99).get_data(as_text=True)
        == "ok"
    )
    assert found == [b"x" * 99 + b"!"] * 2
    assert kinds == [True, True, "OwnRequest"]


@pytest.mark.parametrize("fails", [False, True])
def test_request_is_not_kept(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    """Neither a body that was read nor its error keeps a request in a cycle."""
    app = make_app()
    requests: list[weakref.ref[object]] = []

    @app.post("/")
    def index() -> str:
        requests.append(weakref.ref(request._get_current_object()))  # type: ignore[attr-defined]
        failure = run(lambda: request.get_data()).exception(PATIENCE)
        assert isinstance(failure, TimeoutError) is fails
        # Its traceback refers to the request. So does the environ, and Flask 3.2 does
        # not end that.
        del failure, request.environ["werkzeug.request"]
        return "ok"

    gc.collect()
    gc.disable()

    try:
        end = TimeoutError if fails else None
        assert (
            post(app, Wire(b"x" * 99, end), "text/plain", None).get_data(as_text=True)
            == "ok"
        )

        for record in caplog.records:
            record.exc_info = None

        assert requests[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["run", "open_scope"])
@pytest.mark.parametrize(
    ("method", "environ", "body"),
    [
        ("GET", {}, False),
        ("POST", {"CONTENT_LENGTH": "0"}, False),
        ("POST", {"CONTENT_LENGTH": "1"}, True),
        ("GET", {"CONTENT_LENGTH": "1"}, True),
        ("GET", {"wsgi.input_terminated": True}, False),
        ("POST", {"wsgi.input_terminated": True}, True),
        (
            "GET",
            {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
            True,
        ),
        ("POST", {"HTTP_TRANSFER_ENCODING": "chunked"}, False),
    ],
)
def test_request_without_a_body(
    make_app: AppFactory,
    kind: str,
    method: str,
    environ: dict[str, t.Any],
    body: bool,
) -> None:
    """Nothing is done to a request that has no body, or none that Werkzeug reads."""
    app = make_app()

    with app.test_request_context(method=method, environ_overrides=environ) as context:
        with open_scope() if kind == "open_scope" else contextlib.nullcontext():
            run(int)

        assert (type(context.request) is not flask.Request) is body
        assert isinstance(context.request, flask.Request)


@pytest.mark.parametrize("size", [100, 600_000])
@pytest.mark.parametrize("parsed", [False, True], ids=["unparsed", "parsed"])
def test_upload_that_all_read(make_app: AppFactory, size: int, parsed: bool) -> None:
    """Two tasks and the view read an upload by turns, and each gets the whole of it."""
    app = make_app()
    content = random.Random(size).randbytes(size)
    turns = threading.Barrier(3)

    def read_by_turns() -> bytes:
        upload = request.files["file"]
        parts = []

        for _ in range(4):
            turns.wait(PATIENCE)
            parts.append(upload.read(size // 4))

        return b"".join(parts)

    @app.post("/")
    def index() -> str:
        assert not parsed or request.files
        tasks = [run(read_by_turns), run(read_by_turns)]
        assert read_by_turns() == content
        assert [task.result(PATIENCE) for task in tasks] == [content] * 2
        return "ok"

    body = make_multipart(content)
    answer = post(app, Wire(body), MULTIPART, len(body))
    assert answer.get_data(as_text=True) == "ok"


LINES = b"first\nsecond\nthird\n"


def read_lines(upload: FileStorage) -> list[bytes]:
    """Read an upload line by line."""
    return list(upload)


def save(upload: FileStorage) -> bytes:
    """Save an upload."""
    copy = io.BytesIO()
    upload.save(copy)
    return copy.getvalue()


def seek(upload: FileStorage) -> list[object]:
    """Move about in an upload, and read its end."""
    moves = [upload.seek(-6, io.SEEK_END), upload.tell(), upload.read(None)]
    return [*moves, upload.stream.readable(), upload.stream.seekable()]


def read_buffered(stream: t.Any) -> bytes:
    """Read from the start of a file, as one does who wants larger pieces of it."""
    stream.seek(0)
    buffered = io.BufferedReader(stream)
    content = b"".join(buffered)
    buffered.detach()
    return content


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (read_lines, [b"first\n", b"second\n", b"third\n"]),
        (save, LINES),
        (seek, [13, 13, b"third\n", True, True]),
        (lambda upload: upload.stream.readline(3), b"fir"),
        (lambda upload: upload.stream.mode, "rb+"),
        (lambda upload: read_buffered(upload.stream), LINES),
    ],
    ids=["lines", "save", "seek", "readline", "mode", "buffered"],
)
def test_upload_is_a_file(
    make_app: AppFactory, read: cabc.Callable[[FileStorage], object], found: object
) -> None:
    """Anything a view can do with an upload, it and a task can do with a shared one."""
    app = make_app()

    @app.post("/")
    def index() -> str:
        upload = request.files["file"]
        assert upload.read(2) == b"fi"
        assert run(read, upload).result(PATIENCE) == found
        assert upload.read(2) == b"rs"
        upload.seek(0)
        assert read(upload) == found
        return "ok"

    body = make_multipart(LINES)
    answer = post(app, Wire(body), MULTIPART, len(body))
    assert answer.get_data(as_text=True) == "ok"


def test_upload_as_text_and_to_write(make_app: AppFactory) -> None:
    """An upload on disk can be read as text, written to and truncated."""
    app = make_app()

    def work() -> None:
        upload = request.files["file"]
        text = io.TextIOWrapper(upload.stream)
        assert text.readline() == "first\n"
        text.detach()
        upload.stream.seek(0)
        assert upload.stream.writable()
        assert upload.stream.write(b"FIRST") == 5
        upload.stream.seek(6)
        upload.stream.truncate()

    @app.post("/")
    def index() -> str:
        run(work).result(PATIENCE)
        upload = request.files["file"]
        assert upload.read() == b"FIRST\n"
        assert upload.fileno() > 0
        return "ok"

    body = make_multipart(LINES + bytes(600_000))
    answer = post(app, Wire(body), MULTIPART, len(body))
    assert answer.get_data(as_text=True) == "ok"


@pytest.mark.parametrize("size", [0, 600_000])
def test_upload_that_somebody_closes(make_app: AppFactory, size: int) -> None:
    """Closing an upload, as a text wrapper does, takes it away from nobody else."""
    app = make_app()
    files = []

    def read_text() -> str:
        with io.TextIOWrapper(request.files["file"].stream) as text:
            return text.readline()

    @app.post("/")
    def index() -> str:
        assert run(read_text).result(PATIENCE) == "first\n"
        assert read_text() == "first\n"
        assert run(read_text).result(PATIENCE) == "first\n"
        files.append(request.files["file"].stream)
        request.close()
        return "ok"

    body = make_multipart(LINES + bytes(size))
    answer = post(app, Wire(body), MULTIPART, len(body))
    assert answer.get_data(as_text=True) == "ok"
    assert files[0].closed


@pytest.mark.parametrize(
    "of",
    [lambda upload: upload, lambda upload: upload.stream],
    ids=["upload", "its stream"],
)
@pytest.mark.parametrize("wrap", [lambda method: method, functools.partial])
def test_method_of_an_upload_as_a_task(
    make_app: AppFactory,
    of: cabc.Callable[[t.Any], t.Any],
    wrap: cabc.Callable[[t.Any], t.Any],
) -> None:
    """A method that was looked up before the first task reads all of the upload too."""
    app = make_app()
    names: list[str] = []

    def note(sender: object, name: str, **_: object) -> None:
        names.append(name)

    @app.post("/")
    def index() -> str:
        upload = of(request.files["file"])
        read = wrap(upload.read)
        tasks = [run(read), run(read), run(wrap(upload.read))]
        found = [*(task.result(PATIENCE) for task in tasks), upload.read()]
        assert found == [LINES] * 4
        return "ok"

    body = make_multipart(LINES)

    with task_started.connected_to(note, app):
        assert post(app, Wire(body), MULTIPART, len(body)).data == b"ok"

    assert [name.rpartition(".")[2] for name in names] == ["read"] * 3


def test_method_of_the_request_in_a_partial(make_app: AppFactory) -> None:
    """It shares the body too, and keeps its name as a task."""
    app = make_app()
    wire = Wire(b"x" * 5000, readers=2)
    names: list[str] = []

    def note(sender: object, name: str, **_: object) -> None:
        names.append(name)

    @app.post("/")
    def index() -> str:
        read: t.Any = functools.partial(request.get_data, as_text=True)
        read.task_name = "body.read"
        tasks = [run(read), run(read)]
        assert [task.result(PATIENCE) for task in tasks] == ["x" * 5000] * 2
        return "ok"

    with task_started.connected_to(note, app):
        assert post(app, wire, "text/plain", 5000).data == b"ok"

    assert names == ["body.read"] * 2


def test_other_partial_in_a_request_with_a_body(make_app: AppFactory) -> None:
    """It is called as it is, even if its class makes more of the call."""
    app = make_app()

    class Doubled(functools.partial[int]):
        def __call__(self, *args: t.Any, **kwargs: t.Any) -> int:
            return 2 * super().__call__(*args, **kwargs)

    @app.post("/")
    def index() -> str:
        return str(run(Doubled(int, "21")).result(PATIENCE))

    assert post(app, Wire(b"x"), "text/plain", 1).data == b"42"


@pytest.mark.parametrize("next_line", [lambda file: file.readline(), next])
@pytest.mark.parametrize("size", [100, 600_000])
def test_upload_that_the_view_has_opened_before(
    make_app: AppFactory, size: int, next_line: cabc.Callable[[t.Any], bytes]
) -> None:
    """A view that has the bare file, or a text of it, goes on where it was."""
    app = make_app()
    content = b"".join(b"%d\n" % number for number in range(size // 5))
    reading, read = threading.Event(), threading.Event()

    class Slow(tempfile.SpooledTemporaryFile[bytes]):
        def read(self, *args: t.Any) -> bytes:
            if args == (-2,):
                # The task is at its own position now.
                reading.set()
                read.wait(MOMENT)
                args = ()

            return super().read(*args)

    class SlowUploads(flask.Request):
        def _get_file_stream(self, *args: t.Any, **kwargs: t.Any) -> t.IO[bytes]:
            return Slow(500_000)

    app.request_class = SlowUploads

    def read_all() -> bytes:
        return bytes(request.files["file"].read(-2))

    @app.post("/")
    def index() -> str:
        file: t.Any = request.files["file"].stream
        lines = [file.readline()]
        task = run(read_all)
        assert reading.wait(PATIENCE)
        lines.append(next_line(iter(file)))
        read.set()
        assert task.result(PATIENCE) == content
        lines.append(next(iter(file)))
        lines += file
        assert b"".join(lines) == content
        file.close()
        assert run(request.files["file"].read).result(PATIENCE) == content
        return "ok"

    body = make_multipart(content)
    assert post(app, Wire(body), MULTIPART, len(body)).data == b"ok"


def test_upload_that_moves_to_disk(make_app: AppFactory) -> None:
    """Nobody reads an upload while a task's ``fileno()`` moves it to disk."""
    app = make_app()
    moving, read = threading.Event(), threading.Event()
    overlaps: list[bool] = []

    class Slow(tempfile.SpooledTemporaryFile[bytes]):
        def rollover(self) -> None:
            moving.set()
            overlaps.append(read.wait(MOMENT))
            super().rollover()

        def read(self, *args: t.Any) -> bytes:
            read.set()
            return super().read(*args)

    class SlowUploads(flask.Request):
        def _get_file_stream(self, *args: t.Any, **kwargs: t.Any) -> t.IO[bytes]:
            return Slow(500_000)

    app.request_class = SlowUploads

    def find_number() -> int:
        return int(request.files["file"].fileno())

    def read_all() -> bytes:
        assert moving.wait(PATIENCE)
        return bytes(request.files["file"].read())

    @app.post("/")
    def index() -> str:
        number, content = run(find_number), run(read_all)
        assert number.result(PATIENCE) > 0
        assert content.result(PATIENCE) == LINES
        return "ok"

    body = make_multipart(LINES)
    assert post(app, Wire(body), MULTIPART, len(body)).data == b"ok"
    assert overlaps == [False]


@pytest.mark.skipif(MERGED, reason="Flask closes each request, since 3.2")
@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("size", [100, 600_000])
def test_uploads_of_a_request_that_is_not_closed(
    make_app: AppFactory, size: int
) -> None:
    """A teardown function that raises does not keep the uploads of its request."""
    app = make_app()
    files: list[weakref.ref[object]] = []

    @app.post("/")
    def index() -> str:
        assert len(run(request.files["file"].read).result(PATIENCE)) == size
        files.append(weakref.ref(request.files["file"].stream))
        return "ok"

    def refuse(error: BaseException | None) -> None:
        raise LookupError

    app.teardown_request(refuse)
    body = make_multipart(bytes(size))

    with pytest.raises(LookupError):
        post(app, Wire(body), MULTIPART, len(body))

    assert files[0]() is None


def test_upload_that_was_closed_before_the_first_task(make_app: AppFactory) -> None:
    """It stays closed, and nothing else goes wrong."""
    app = make_app()

    @app.post("/")
    def index() -> str:
        with request.files["file"].stream as file:
            assert file.readline() == b"first\n"

        assert run(read_form).result(PATIENCE) == {"colour": "blue"}
        error = run(request.files["file"].read).exception(PATIENCE)
        assert isinstance(error, ValueError)
        return "ok"

    body = make_multipart(LINES)
    assert post(app, Wire(body), MULTIPART, len(body)).data == b"ok"


def test_uploads_of_requests_within_a_task(make_app: AppFactory) -> None:
    """A task that posts uploads to its own app sends each of them from the start."""
    app = make_app()

    @app.post("/upload")
    def upload() -> str:
        run(int)
        return str(request.files["file"].read(), "ascii")

    @app.post("/")
    def index() -> list[str]:
        def post_all() -> list[str]:
            client = app.test_client()
            files = [{"file": (io.BytesIO(b"whole"), "file")} for _ in range(20)]
            return [client.post("/upload", data=data).text for data in files]

        return run(post_all).result(PATIENCE)

    assert app.test_client().post("/").json == ["whole"] * 20


def test_upload_of_the_apps_own(make_app: AppFactory) -> None:
    """A file that the app has made for uploads is left alone."""
    app = make_app()

    class Sink(io.RawIOBase):
        def write(self, data: object) -> int:
            return 0

        def seek(self, offset: int, whence: int = 0, /) -> int:
            return 0

    class SinkRequest(flask.Request):
        def _get_file_stream(self, *args: object, **kwargs: object) -> t.Any:
            return Sink()

    app.request_class = SinkRequest

    @app.post("/")
    def index() -> str:
        stream = run(lambda: request.files["file"].stream).result(PATIENCE)
        assert isinstance(stream, Sink)
        return "ok"

    body = make_multipart(LINES)
    answer = post(app, Wire(body), MULTIPART, len(body))
    assert answer.get_data(as_text=True) == "ok"


def ask(
    port: int,
    path: str,
    body: bytes | cabc.Iterable[bytes],
    kind: str = "text/plain",
) -> tuple[int, t.Any]:
    """Send a request over a connection of its own, in chunks if it is iterable."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    with contextlib.closing(connection):
        headers = {"Content-Type": kind}
        connection.request("POST", path, body, headers)

        with connection.getresponse() as response:
            text = response.read().decode()

    return response.status, json.loads(text) if response.status == 200 else text


def cut(body: bytes, size: int) -> cabc.Iterator[bytes]:
    """Cut a body into chunks."""
    return (body[place : place + size] for place in range(0, len(body), size))


@pytest.mark.servers
@pytest.mark.parametrize("kind", KINDS)
def test_bodies_on_real_servers(kind: str) -> None:
    """Tasks and views get the whole body from every server, and all get answers."""
    order = json.dumps({"item": "x" * 200_000}).encode()

    with serve(kind, "bodies_app:app") as server:
        for _ in range(5):
            answer = ask(server.port, "/json", order, "application/json")
            assert answer == (200, [200_000] * 3)

        for size in (100, 50 * 2**20):
            content = b"y" * size
            digest = hashlib.sha256(content).hexdigest()
            assert ask(server.port, "/both", content) == (200, [digest] * 2)
            assert ask(server.port, "/late", content) == (200, [])
            answer = ask(server.port, "/upload", make_multipart(content), MULTIPART)
            assert answer == (200, [digest] * 3 + ["blue"])

        status, _ = ask(server.port, "/json", b"{", "application/json")
        assert status == 400


@pytest.mark.servers
@pytest.mark.parametrize("kind", CHUNKED)
def test_chunks_on_real_servers(kind: str) -> None:
    """The same holds for a chunked body, and the app's limit still applies."""
    content = b"x" * 200_000
    digest = hashlib.sha256(content).hexdigest()
    too_large = make_multipart(bytes(LIMIT))

    with serve(kind, "bodies_app:app") as server:
        for _ in range(5):
            answer = ask(server.port, "/both", cut(content, 2000))
            assert answer == (200, [digest] * 2)

        # A server may hang up on a client that still sends.
        with contextlib.suppress(ConnectionError):
            answer = ask(server.port, "/upload", cut(too_large, 2**20), MULTIPART)
            assert answer[0] == 413


@pytest.mark.servers
@pytest.mark.parametrize("kind", CONCURRENT)
def test_slow_client_on_real_servers(kind: str) -> None:
    """Only a slow body's own tasks wait for it, and nobody else."""
    body = b"x" * 5000
    digest = hashlib.sha256(body).hexdigest()
    head = (
        "POST /both HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    )

    with (
        serve(kind, "bodies_app:app") as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as slow,
    ):
        slow.sendall(head.encode() + body[:1000])
        assert ask(server.port, "/both", b"") == (200, [EMPTY] * 2)
        slow.sendall(body[1000:])
        answer = b""

        while more := slow.recv(65536):
            answer += more

    assert answer.count(digest.encode()) == 2, answer


def test_two_scopes_share_a_body(make_app: AppFactory) -> None:
    """That of a block, and that of the request around it."""
    app = make_app()

    @app.post("/")
    def index() -> list[object]:
        with open_scope():
            first = run(request.get_json)

        return [first.result(), run(request.get_json).result(), request.get_json()]

    response = app.test_client().post("/", json="whole")
    assert response.json == ["whole"] * 3
