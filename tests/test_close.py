from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import http.client
import io
import os
import signal
import threading
import typing as t
import warnings
import weakref

import flask
import flask_mail
import pytest
from conftest import PATIENCE
from flask import abort
from flask import copy_current_request_context
from flask import current_app
from flask import Flask
from flask import g
from flask import got_request_exception
from flask import redirect
from flask import render_template_string
from flask import request
from flask import request_finished
from flask import Response
from flask import send_file
from flask import session
from flask import stream_with_context
from flask import url_for
from flask_mail import Message
from late_threads import in_time
from late_threads import make_late
from late_threads import note_return
from mailbox_server import Mailbox
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import make_server
from werkzeug.test import EnvironBuilder

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import ScopeClosed
from flask_apitask import scoped
from flask_apitask import TaskScope
from flask_apitask import wait
from flask_apitask.context import find_request_context
from flask_apitask.context import MERGED
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.request_scope import Closing
from flask_apitask.request_scope import RequestScope

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib
    from concurrent.futures import Future

    from conftest import AppFactory


class Argument:
    """An object that can be referred to weakly."""


class Exchange:
    """A request to an app, and what a WSGI server does with the response."""

    def __init__(self, app: t.Any, path: str = "/", **request: t.Any) -> None:
        builder = EnvironBuilder(path=path, **request)
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.iterable = app(builder.get_environ(), self._start)
        builder.close()

    def read(self) -> bytes:
        """Send the body."""
        return b"".join(self.iterable)

    def close(self) -> None:
        """Tell the app that the response was sent, or could not be."""
        getattr(self.iterable, "close", bool)()

    def _start(self, status: str, headers: t.Any, exc_info: t.Any = None) -> t.Any:
        self.status = status
        self.headers = [pair for pair in headers if pair[0] != "Date"]


def serve(app: t.Any, events: list[str], path: str = "/", **request: t.Any) -> Exchange:
    """Serve a request to its end, and note what the server comes to do."""
    exchange = Exchange(app, path, **request)
    events.append("returned")
    exchange.read()
    events.append("sent")
    exchange.close()
    events.append("closed")
    return exchange


def answering(fn: t.Any, *args: object) -> cabc.Callable[[], str]:
    """Return a view that starts a task."""

    def view() -> str:
        run(fn, *args)
        return "ok"

    return view


def starting(fn: t.Any, *args: object) -> cabc.Callable[..., None]:
    """Return a function that starts a task, for any hook of Flask."""

    def start(*args_of_hook: object) -> None:
        run(fn, *args)

    return start


def answer_first(**config: t.Any) -> Flask:
    """Make an app that answers first, and whose tasks run where somebody waits."""
    app = Flask(__name__)
    app.config.update(APITASK_WAIT="close", **config)
    ApiTask(app)
    return make_late(app)


IN_ORDER = ["returned", "sent", "task", "closed"]

OUTCOMES: list[tuple[str, str, dict[str, str], int]] = [
    ("GET", "/ok", {}, 200),
    ("HEAD", "/ok", {}, 200),
    ("OPTIONS", "/ok", {}, 200),
    ("GET", "/redirect", {}, 302),
    ("GET", "/abort", {}, 418),
    ("GET", "/missing", {}, 404),
    ("POST", "/ok", {}, 405),
    ("GET", "/boom", {}, 500),
    ("GET", "/empty", {}, 204),
    ("GET", "/unchanged", {}, 304),
    ("GET", "/generated", {}, 200),
    ("HEAD", "/generated", {}, 200),
    ("GET", "/streamed", {}, 200),
    ("HEAD", "/streamed", {}, 200),
    ("GET", "/file", {}, 200),
    ("HEAD", "/file", {}, 200),
    ("GET", "/file", {"Range": "bytes=2-4"}, 206),
    ("GET", "/file", {"Range": "bytes=90-99"}, 416),
    ("GET", "/file", {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}, 304),
    ("GET", "/passed", {}, 200),
]


def add_outcomes(app: Flask, file: pathlib.Path) -> Flask:
    """Give an app a view for each way to answer."""

    def passed() -> Response:
        return Response([b"1", b"2"], direct_passthrough=True)

    def streamed() -> Response:
        return Response(stream_with_context(iter("12")))

    app.add_url_rule("/ok", "ok", lambda: "ok")
    app.add_url_rule("/redirect", "redirect", lambda: redirect("/ok", 302))
    app.add_url_rule("/abort", "abort", lambda: abort(418))
    app.add_url_rule("/boom", "boom", lambda: str(1 / 0))
    app.add_url_rule("/empty", "empty", lambda: ("", 204))
    app.add_url_rule("/unchanged", "unchanged", lambda: ("", 304))
    app.add_url_rule("/generated", "generated", lambda: Response(iter("12")))
    app.add_url_rule("/streamed", "streamed", streamed)
    app.add_url_rule("/file", "file", lambda: send_file(file))
    app.add_url_rule("/passed", "passed", passed)
    return app


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a file to send."""
    path = tmp_path / "file.txt"
    path.write_bytes(b"0123456789")
    return path


@pytest.mark.parametrize(("method", "path", "headers", "status"), OUTCOMES)
def test_response_is_sent_before_the_tasks(
    file: pathlib.Path, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """However a request ends, its response is sent first, and is what it was."""
    app = add_outcomes(answer_first(), file)
    events: list[str] = []
    app.before_request(starting(events.append, "task"))
    exchange = serve(app, events, path, method=method, headers=headers)
    plain = Exchange(
        add_outcomes(Flask(__name__), file), path, method=method, headers=headers
    )
    again = Exchange(app, path, method=method, headers=headers)

    assert events == IN_ORDER
    assert (exchange.status, exchange.headers) == (plain.status, plain.headers)
    assert exchange.status.startswith(str(status))
    assert again.read() == plain.read()
    again.close()
    plain.close()


def test_body_is_with_the_client_before_the_task_ends(make_app: AppFactory) -> None:
    """A client on the network has the whole body while the task still runs."""
    app = make_app(APITASK_WAIT="close")
    received = threading.Event()
    events: list[str] = []

    def work() -> None:
        assert received.wait(PATIENCE)
        events.append("task")

    @app.get("/")
    def index() -> str:
        run(work)
        return "body"

    def ask(port: int) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

        with contextlib.closing(connection):
            connection.request("GET", "/")
            return connection.getresponse().read()

    with make_server("127.0.0.1", 0, app) as server:
        serving = threading.Thread(target=server.handle_request)
        serving.start()

        try:
            assert ask(server.server_port) == b"body"
            assert events == []
        finally:
            received.set()
            serving.join(PATIENCE)

    # The server's thread was held until then.
    assert not serving.is_alive()
    assert events == ["task"]


def test_default_has_no_part_in_a_response(make_app: AppFactory) -> None:
    """An app that waits in the teardown, or has no scopes, pays for none of it."""
    for config in ({}, {"APITASK_ENABLED": False, "APITASK_WAIT": "close"}):
        assert not request_finished.has_receivers_for(make_app(**config))


def test_running_task_is_waited_for(make_app: AppFactory) -> None:
    """A task that a thread is busy with is waited for at the close, but once."""
    app = make_app(APITASK_WAIT="close")
    begun, closing = threading.Event(), threading.Event()
    done: list[bool] = []

    def work() -> None:
        begun.set()
        assert closing.wait(PATIENCE)
        done.append(True)

    class Body:
        """A body of which the close comes before that of the response."""

        def __iter__(self) -> cabc.Iterator[str]:
            return iter("body")

        def close(self) -> None:
            closing.set()

    @app.get("/")
    def index() -> Response:
        run(work)
        return Response(Body())

    exchange = Exchange(app)
    assert begun.wait(PATIENCE)
    assert exchange.read() == b"body"

    for _ in range(2):
        in_time(exchange.close)
        assert done == [True]


def test_task_of_a_teardown_function() -> None:
    """What one starts, before ours or after it, does not keep the answer."""
    for early in (True, False):
        app = Flask(__name__)
        app.config["APITASK_WAIT"] = "close"
        events: list[str] = []
        app.add_url_rule("/", "index", answering(str))
        start = starting(events.append, "task")

        if early:
            app.teardown_request(start)

        ApiTask(app)

        if not early:
            app.teardown_request(start)

        make_late(app)
        serve(app, events)
        # After ours it is a plain call.
        assert events == (["task", "returned", "sent", "closed"] if early else IN_ORDER)


def test_scope_is_closed_with_the_request() -> None:
    """After the request a task is refused, also while its others are waited for."""
    app = answer_first()
    scopes: list[t.Any] = []

    @app.get("/")
    def index() -> str:
        scopes.append(current_scope())
        return "ok"

    exchange = Exchange(app)

    with pytest.raises(ScopeClosed):
        scopes[0].submit(str)

    exchange.close()


# What keeps a response from being sent.


@pytest.mark.parametrize("how", ["propagated", "refused", "refused error page"])
def test_response_that_is_not_sent(how: str) -> None:
    """Where no response is made, or the server refuses it, the teardown waits."""
    app = answer_first(PROPAGATE_EXCEPTIONS=how == "propagated")
    events: list[str] = []
    note_return(app, events)
    app.before_request(starting(events.append, "task"))
    app.add_url_rule("/", "index", lambda: "ok" if how == "refused" else str(1 / 0))

    def refuse(*args: object) -> t.NoReturn:
        raise ConnectionResetError

    with pytest.raises((ConnectionResetError, ZeroDivisionError)):
        app(EnvironBuilder().get_environ(), refuse)

    assert events == ["task", "returned"]


@pytest.mark.parametrize("page", ["finished", "unfinished", "none"])
def test_response_that_takes_the_place_of_another(
    monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    """If a finished response is not sent, the tasks end with the one that is.

    And in the teardown, if that is not finished or if there is none.
    """
    app = answer_first(PROPAGATE_EXCEPTIONS=page == "none")
    events: list[str] = []
    finalize, attempts = app.finalize_request, []
    app.add_url_rule("/", "index", answering(events.append, "task"))

    def fail_late(*args: t.Any, **kwargs: t.Any) -> Response:
        response = finalize(*args, **kwargs)
        attempts.append(response)

        if len(attempts) == 1:
            raise LookupError

        return response

    @app.after_request
    def after(response: Response) -> Response:
        if attempts and page == "unfinished":
            raise LookupError

        return response

    monkeypatch.setattr(app, "finalize_request", fail_late)

    with pytest.raises(LookupError) if page == "none" else contextlib.nullcontext():
        assert serve(app, events).status.startswith("500")

    expected = {"finished": IN_ORDER, "none": ["task"]}
    assert events == expected.get(page, ["task", "returned", "sent", "closed"])


def test_exception_outside_of_a_request() -> None:
    """The signal that tells of an exception may be sent where there is no request."""
    app = answer_first()

    with app.app_context():
        assert got_request_exception.send(app, exception=LookupError())


def test_context_without_a_response() -> None:
    """In a test_request_context the tasks are done at the end of the block."""
    app = answer_first()
    done: list[str] = []

    with app.test_request_context():
        run(done.append, "task")
        assert done == []

    assert done == ["task"]


@pytest.mark.parametrize("how", ["teardown_request", "teardown_appcontext"])
def test_another_teardown_that_raises(make_app: AppFactory, how: str) -> None:
    """Of a response that a failing teardown keeps back, no task is lost."""
    app = make_app(APITASK_WAIT="close")
    done = threading.Event()
    app.add_url_rule("/", "index", answering(done.set))

    @app.before_request
    def before() -> None:
        g.of_request = True

    def broken(exc: BaseException | None) -> None:
        if "of_request" in g:
            raise LookupError("another extension")

    getattr(app, how)(broken)

    with pytest.raises(Exception, match=r"another extension|Errors during context"):
        Exchange(app)

    assert done.wait(PATIENCE)


# Bodies that are made while they are sent.


@pytest.mark.parametrize("reads", ["all", "first", "none"])
@pytest.mark.parametrize("fails", [True, False])
def test_stream_with_context(reads: str, fails: bool) -> None:
    """What a generator starts is done with the response, also if the client has gone.

    Flask 3.1 tears the request down before the generator runs, so that a task is a
    plain call there. From 3.2 on it ends with the response. If the generator raises,
    the server is told of that, and so is the teardown, which waits.
    """
    app = answer_first()
    events: list[str] = []

    @app.get("/")
    def index() -> Response:
        def generate() -> cabc.Iterator[str]:
            run(events.append, "first")
            yield "1"

            if fails:
                raise LookupError

            run(events.append, "second")
            yield "2"

        run(events.append, "view")
        return Response(stream_with_context(generate()))

    exchange = Exchange(app)
    body = iter(exchange.iterable)

    if reads != "none":
        assert next(body) == b"1"

    if reads == "all":
        with pytest.raises(LookupError) if fails else contextlib.nullcontext():
            assert list(body) == [b"2"]

    started = [] if reads == "none" else ["first"]
    started += ["second"] if reads == "all" and not fails else []

    if MERGED:
        in_teardown = ["view", *started] if reads == "all" and fails else []
    else:
        in_teardown = started

    assert events == in_teardown
    exchange.close()
    assert sorted(events) == sorted(["view", *started])


def test_generator_without_context() -> None:
    """A task of a plain generator is a plain call, as ever."""
    app = answer_first()
    events: list[str] = []

    @app.get("/")
    def index() -> Response:
        def generate() -> cabc.Iterator[str]:
            run(events.append, "generator")
            yield "1"

        run(events.append, "task")
        return Response(generate())

    serve(app, events)
    assert events == ["returned", "generator", "sent", "task", "closed"]


class OwnFile:
    """What a server gives an app to send files with: it knows it by its class."""

    def __init__(self, file: t.IO[bytes], size: int = 8192) -> None:
        self._file = file
        self.close = file.close

    def __iter__(self) -> cabc.Iterator[bytes]:
        return iter(functools.partial(self._file.read, 4), b"")


@pytest.mark.parametrize("works", [True, False])
def test_file_is_left_to_the_server(file: pathlib.Path, works: bool) -> None:
    """A file is sent in the server's own way, unless there is a task to wait for."""
    app = answer_first()
    done: list[str] = []

    @app.get("/")
    def index() -> Response:
        if works:
            run(done.append, "task")

        return send_file(file)

    exchange = Exchange(app, environ_base={"wsgi.file_wrapper": OwnFile})
    assert isinstance(exchange.iterable, OwnFile) is not works
    assert exchange.read() == b"0123456789"
    assert done == []
    exchange.close()
    assert done == (["task"] if works else [])


# Requests in requests, and what is around them.


def test_nested_requests() -> None:
    """A request in a view, and a mounted app, wait for their own tasks only."""
    app, mounted = answer_first(), answer_first()
    site = DispatcherMiddleware(app, {"/mounted": mounted})
    events: list[str] = []

    @app.get("/outer")
    def outer() -> str:
        run(events.append, "outer task")
        serve(site, events, "/inner")
        serve(site, events, "/mounted/")
        return "ok"

    app.add_url_rule("/inner", "inner", answering(events.append, "inner"))
    mounted.add_url_rule("/", "index", answering(events.append, "mounted"))
    serve(site, events, "/outer")

    inner = ["returned", "sent", "inner", "closed"]
    mount = ["returned", "sent", "mounted", "closed"]
    assert events == [*inner, *mount, "returned", "sent", "outer task", "closed"]


@pytest.mark.parametrize("where", ["same thread", "thread", "later"])
def test_copied_request_context(where: str) -> None:
    """A copy of the context waits for its own tasks at its own end, for no others."""
    app = answer_first()
    events: list[str] = []
    copies: list[cabc.Callable[[], None]] = []

    @app.get("/")
    def index() -> str:
        @copy_current_request_context
        def copied() -> None:
            run(events.append, "copied")
            events.append("end of copy")

        run(events.append, "task")
        copies.append(copied)

        if where != "later":
            copied() if where == "same thread" else in_time(copied)

        return "ok"

    exchange = Exchange(app)

    if where == "later":
        in_time(copies[0])

    assert events == ["end of copy", "copied"]
    exchange.close()
    assert events == ["end of copy", "copied", "task"]


def test_middleware_that_drops_the_close(make_app: AppFactory) -> None:
    """A middleware that never closes leaves the tasks to the threads, not undone."""
    app = make_app(APITASK_WAIT="close", APITASK_MAX_WORKERS=1)
    release = threading.Event()
    done: list[int] = []
    last = threading.Event()

    @app.get("/")
    def index() -> str:
        run(release.wait, PATIENCE)
        run(done.append, 1)
        run(last.set)
        return "ok"

    def drop(environ: t.Any, start_response: t.Any) -> t.Any:
        return list(inner(environ, start_response))

    inner, app.wsgi_app = app.wsgi_app, drop  # type: ignore[method-assign]
    # It says that a scope was never ended, if so.
    gc.collect()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serve(app, [])

    assert done == []
    release.set()
    assert last.wait(PATIENCE)
    assert done == [1]


def test_one_response_for_all_requests() -> None:
    """An app may answer all requests with one object, at the same time and for ever."""
    app = answer_first()
    events: list[str] = []
    shared = Response("ok")

    @app.get("/<name>")
    def index(name: str) -> Response:
        run(events.append, name)
        return shared

    for name in "ab":
        serve(app, events, name)
        assert events == ["returned", "sent", name, "closed"]
        events.clear()

    assert len(shared._on_close) == 1
    first, second = Exchange(app, "first"), Exchange(app, "second")
    assert events == []
    first.close()
    assert events == ["first", "second"]
    second.close()
    assert events == ["first", "second"]


def test_response_closed_before_the_teardown() -> None:
    """If the response is closed already, the teardown waits."""
    app = answer_first()
    events: list[str] = []
    shared = Response("ok")
    note_return(app, events)

    @app.get("/")
    def index() -> Response:
        run(events.append, "task")
        return shared

    # Called before ours. Another request, with the same response, is over now.
    app.teardown_request(lambda exc: shared.close())
    Exchange(app)

    assert events == ["task", "returned"]


@pytest.mark.parametrize("when", ["during the close", "after it"])
def test_scope_that_comes_late(when: str) -> None:
    """What is added to a response that is being closed, or was, is ended at once."""
    closing = Closing(answers_first=True)
    pool = ThreadPool(1)
    first, late = TaskScope(pool, 1), TaskScope(pool, 1)
    begun, gate = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert gate.wait(PATIENCE)

    first.submit(work)
    closing.add(first)
    thread = threading.Thread(target=closing.close, daemon=True)

    if when == "after it":
        gate.set()

    thread.start()
    assert begun.wait(PATIENCE)

    if when == "after it":
        thread.join(PATIENCE)

    # Beyond the pool's size, while the first is busy.
    future = late.submit(str)
    closing.add(late)
    assert future.done()
    gate.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    closing.close()


# Tests of apps.


@pytest.mark.parametrize("how", ["with", "close", "buffered", "data"])
def test_client_waits_once_it_closes(how: str) -> None:
    """The client of Flask waits where it closes the response; its text is too early."""
    app = answer_first()
    done: list[str] = []
    app.add_url_rule("/", "index", answering(done.append, "task"))
    client = app.test_client()
    response: t.Any = None

    if how == "with":
        with client.get("/") as response:
            assert done == []
    elif how == "close":
        response = client.get("/")
        assert done == []
        response.close()
    else:
        response = client.get("/", buffered=how == "buffered")

    assert response.text == "ok"
    assert done == ([] if how == "data" else ["task"])
    response.close()
    assert done == ["task"]


@pytest.mark.parametrize("keeps", ["closed", "dropped", "open"])
def test_client_that_preserves_the_context(keeps: str) -> None:
    """What runs in a client's with block is done at its end, or with the response."""
    app = answer_first()
    events: list[str] = []
    app.add_url_rule("/", "index", answering(events.append, "task"))
    response: t.Any = None

    with app.test_client() as client:
        response = client.get("/")
        assert events == []

        if keeps == "closed":
            response.close()
            assert events == ["task"]
        elif keeps == "dropped":
            response = None

        assert flask.has_request_context()
        run(events.append, "block")

    if keeps == "open":
        response.close()

    assert "block" in events
    # That of a response that nobody has is left to the threads, and there are none.
    assert ("task" in events) is (keeps != "dropped")


# What a task can use, and what not.


def serve_and_work(app: Flask, work: cabc.Callable[[], object]) -> Future[t.Any]:
    """Make a request, and call a function in a task of it once that is over."""
    over = threading.Event()
    futures: list[Future[t.Any]] = []

    def late() -> object:
        assert over.wait(PATIENCE)
        return work()

    @app.post("/path/<name>")
    def index(name: str) -> Response:
        g.who = "request"
        session["user"] = "ann"
        assert flask.request.get_json() == {"number": 7}
        futures.append(run(late))
        return Response("ok")

    exchange = Exchange(
        app, "/path/x?q=1", method="POST", json={"number": 7}, headers={"X-Id": "9"}
    )
    assert exchange.read() == b"ok"
    assert not flask.has_app_context()
    over.set()
    in_time(exchange.close)
    return futures[0]


def test_context_of_a_task_outlives_that_of_the_request(make_app: AppFactory) -> None:
    """A task finds app, request and session after the request's own end."""
    app = make_app(APITASK_WAIT="close", SECRET_KEY="secret")

    def work() -> dict[str, object]:
        return {
            "app": current_app._get_current_object(),  # type: ignore[attr-defined]
            "g": list(g),
            "request": (request.method, request.path, request.view_args),
            "endpoint": request.endpoint,
            "args": request.args["q"],
            "headers": request.headers["X-Id"],
            "json": request.json,
            "session": dict(session),
            "url": url_for("index", name="y", _external=True),
            "template": render_template_string("{{ request.path }}"),
        }

    assert serve_and_work(app, work).result(0) == {
        "app": app,
        "g": [],
        "request": ("POST", "/path/x", {"name": "x"}),
        "endpoint": "index",
        "args": "1",
        "headers": "9",
        "json": {"number": 7},
        "session": {"user": "ann"},
        "url": "http://localhost/path/y",
        "template": "/path/x",
    }


def test_failing_task_is_logged(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that fails when the client has its answer is logged with its request."""
    app = make_app(APITASK_WAIT="close", SECRET_KEY="secret")
    future = serve_and_work(app, lambda: 1 / 0)

    assert isinstance(future.exception(0), ZeroDivisionError)
    (record,) = caplog.records
    assert vars(record)["apitask_endpoint"] == "index"
    assert record.levelname == "ERROR"
    assert " of POST /path/<name> failed after " in record.getMessage()


def test_uploads_are_closed() -> None:
    """Uploads are closed before the tasks at the close run: read them in the view."""
    app = answer_first()
    seen: list[bool] = []

    @app.post("/")
    def index() -> str:
        stream = request.files["file"].stream
        run(lambda: seen.append(stream.closed))
        return "ok"

    serve(app, [], method="POST", data={"file": (io.BytesIO(b"upload"), "name.txt")})
    assert seen == [True]


# Deadlines, processes, memory.


@pytest.mark.parametrize("per_view", [True, False])
def test_deadline_counts_from_the_close(
    caplog: pytest.LogCaptureFixture, make_app: AppFactory, per_view: bool
) -> None:
    """At the deadline after the close, what was not begun is cancelled, and logged."""
    app = make_app(
        APITASK_POOL_SIZE=1,
        APITASK_TIMEOUT=PATIENCE if per_view else 0.01,
        APITASK_WAIT="teardown" if per_view else "close",
    )
    futures: list[Future[t.Any]] = []
    release = threading.Event()

    def index() -> str:
        futures.append(run(release.wait, PATIENCE))
        futures.append(run(str))
        return "ok"

    limits: dict[str, t.Any] = {"wait": "close", "timeout": 0.01} if per_view else {}
    app.add_url_rule("/", "index", scoped(max_workers=1, **limits)(index))

    if not per_view:
        app.view_functions["index"] = index
        app.extensions["apitask"] = app.extensions["apitask"]._replace(
            config=dataclasses.replace(app.extensions["apitask"].config, max_workers=1)
        )

    exchange = Exchange(app)
    assert not futures[1].cancelled()
    assert caplog.records == []
    exchange.close()
    assert futures[1].cancelled()
    release.set()
    cancelled, running = caplog.records
    assert vars(cancelled)["apitask_endpoint"] == "index"
    assert cancelled.getMessage().endswith("was cancelled: not begun within 0.01 s.")
    assert running.getMessage().startswith("Went on of GET / without 1 task(s)")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_between_response_and_close() -> None:
    """A child forked before the close leaves the tasks to its parent."""
    app = answer_first()
    done: list[str] = []
    app.add_url_rule("/", "index", answering(done.append, "task"))
    exchange = Exchange(app)

    with warnings.catch_warnings():
        # Of other threads of the tests, from Python 3.12 on.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()

    if child == 0:
        signal.alarm(int(PATIENCE))
        exchange.close()
        os._exit(len(done))

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert done == []
    exchange.close()
    assert done == ["task"]


@pytest.mark.parametrize("fails", [False, True])
def test_no_reference_to_an_argument_is_left(
    monkeypatch: pytest.MonkeyPatch, fails: bool, without_gc: None
) -> None:
    """After the close, nothing refers to a task's arguments or to its request."""
    app = answer_first()
    # The records hold the exception, and pytest holds the records.
    monkeypatch.setattr(app.logger, "disabled", True)
    references: list[weakref.ref[t.Any]] = []

    def work(argument: Argument, fails: bool) -> None:
        if fails:
            raise ValueError(argument)

    @app.get("/")
    def index() -> str:
        argument = Argument()
        references.append(weakref.ref(argument))
        references.append(weakref.ref(find_request_context()))
        run(work, argument, fails)
        return "ok"

    exchange = Exchange(app)
    assert references[0]() is not None
    exchange.close()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("per_view", [True, False])
def test_app_goes_with_its_last_reference(
    closes: bool, per_view: bool, without_gc: None
) -> None:
    """An app is freed without the garbage collector, closed responses or not."""
    gone = threading.Event()
    app = Flask(__name__)
    app.config["APITASK_WAIT"] = "teardown" if per_view else "close"
    ApiTask(app)

    def index() -> str:
        assert run(str, "ok").result(PATIENCE) == "ok"
        return "ok"

    view = scoped(index, wait="close") if per_view else index  # type: ignore[call-overload]
    app.add_url_rule("/", "index", view)
    exchanges = [Exchange(app) for _ in range(2)]

    while exchanges and closes:
        exchanges.pop().close()

    # A thread that goes home may be the last to let go of it.
    reference = weakref.ref(app, lambda _: gone.set())
    del app, exchanges, view
    assert gone.wait(PATIENCE)
    assert reference() is None


# One view.


@pytest.mark.parametrize("waits", ["teardown", "close"])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_view_that_answers_first(
    make_app: AppFactory, waits: str, fails: bool, is_async: bool, enabled: bool
) -> None:
    """The tasks of the view are awaited at the close, the others as configured."""
    app = make_late(make_app(APITASK_WAIT=waits, APITASK_ENABLED=enabled))
    events: list[str] = []

    def work() -> str:
        assert "max_workers=3>" in repr(current_scope())
        run(events.append, "view task")
        events.append("view")

        if fails:
            raise LookupError

        return "ok"

    @scoped(wait="close", max_workers=3)
    async def async_view() -> str:
        return work()

    view = async_view if is_async else scoped(wait="close", max_workers=3)(work)
    app.add_url_rule("/", "index", view)
    app.before_request(starting(events.append, "other"))
    serve(app, events)
    start, end = ["view", "returned", "sent", "view task"], ["closed"]

    if not enabled:
        assert events == ["other", *start, *end]
    elif waits == "close":
        assert events == [*start, "other", *end]
    else:
        assert events == ["view", "other", *start[1:], *end]


def test_view_sends_a_file(make_app: AppFactory, file: pathlib.Path) -> None:
    """A view can answer first with a file, in an app that does not.

    Its scope takes no task once it is left, though nobody waits for it yet.
    """
    app = make_late(make_app())
    events: list[str] = []
    scopes: list[t.Any] = []

    @app.get("/")
    @scoped(wait="close")
    def index() -> Response:
        run(events.append, "task")
        scopes.append(current_scope())
        return send_file(file)

    @app.after_request
    def after(response: Response) -> Response:
        assert current_scope() is not scopes[0]

        with pytest.raises(ScopeClosed):
            scopes[0].submit(str)

        return response

    serve(app, events)
    assert events == IN_ORDER


def test_outer_context_keeps_no_request(make_app: AppFactory, without_gc: None) -> None:
    """An app context around a request does not keep what its view has left."""
    app = make_app()
    references: list[weakref.ref[t.Any]] = []

    @app.get("/")
    @scoped(wait="close")
    def index() -> str:
        run(int)
        references.append(weakref.ref(find_request_context()))
        return "ok"

    with app.app_context():
        app.test_client().get("/").close()
        assert references[0]() is None


@pytest.mark.parametrize("is_async", [True, False])
def test_function_outside_of_a_request(make_app: AppFactory, is_async: bool) -> None:
    """Where no response comes, the tasks are done when the function returns."""
    app = make_late(make_app())
    events: list[str] = []

    @scoped(wait="close")
    def function() -> None:
        run(events.append, "task")

    @scoped(wait="close")
    async def async_function() -> None:
        run(events.append, "task")

    def call() -> None:
        app.ensure_sync(async_function)() if is_async else function()
        events.append("returned")

    with app.app_context():
        call()

    with make_app().test_request_context(), app.app_context():
        call()

    assert events == ["task", "returned"] * 2


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_function_in_a_context_without_a_response(
    make_app: AppFactory, enabled: bool, inner: bool
) -> None:
    """What a function leaves to a response that never comes ends with the request."""
    app = make_late(make_app(APITASK_ENABLED=enabled))
    events: list[str] = []

    @scoped(wait="close")
    def function() -> None:
        run(events.append, "task")

    with app.test_request_context():
        with app.app_context() if inner else contextlib.nullcontext():
            function()
            function()

        # There is no request in the inner one, from Flask 3.2 on.
        assert events == (["task"] * 2 if inner and MERGED else [])

    assert events == ["task"] * 2


@pytest.mark.parametrize("hook", ["teardown_request", "teardown_appcontext"])
@pytest.mark.parametrize("early", [True, False])
def test_function_in_a_teardown(hook: str, early: bool) -> None:
    """A function that is called in a teardown, before ours or after it, loses none."""
    app = Flask(__name__)
    events: list[str] = []
    app.add_url_rule("/", "index", lambda: "ok")

    @scoped(wait="close")
    def function() -> None:
        run(events.append, "task")

    def teardown(exc: BaseException | None) -> None:
        if threading.current_thread() is main and not events:
            function()

    if early:
        getattr(app, hook)(teardown)

    ApiTask(app)

    if not early:
        getattr(app, hook)(teardown)

    main = threading.current_thread()
    make_late(app)
    serve(app, events)
    assert events == ["task", "returned", "sent", "closed"]


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("in_view", [False, True])
def test_function_in_a_task(
    make_app: AppFactory, in_view: bool, in_block: bool
) -> None:
    """What a function starts in a task is done when it returns: no response is its."""
    app = make_late(make_app())
    events: list[str] = []

    @scoped(wait="close")
    def function() -> None:
        run(events.append, "inner")

    def work() -> None:
        with open_scope() if in_block else contextlib.nullcontext():
            function()
            events.append("task")

    @app.get("/")
    def index() -> str:
        run(work)

        if in_view:
            wait()

        run(events.append, "next")
        return "ok"

    serve(app, events)
    assert events[:3] == ["inner", "task", "next"]


def test_request_inside_a_task(make_app: AppFactory) -> None:
    """A view leaves its tasks to its response, in a task of another request, too."""
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/inner")
    @scoped(wait="close")
    def inner() -> str:
        run(events.append, "task")
        return "ok"

    app.add_url_rule("/", "index", answering(serve, app, events, "/inner"))
    app.test_client().get("/")
    assert events == ["returned", "sent", "task", "closed"]


def test_request_that_ends_while_a_function_leaves(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a function has started is ended by the request, or where it returns."""
    app = make_late(make_app())
    done: list[str] = []
    defer = RequestScope.defer
    request_context = app.test_request_context()
    request_context.push()

    def end_first(self: RequestScope, scope: TaskScope) -> None:
        request_context.pop()
        assert done == []
        defer(self, scope)

    monkeypatch.setattr(RequestScope, "defer", end_first)

    @scoped(wait="close")
    def function() -> None:
        run(done.append, "task")

    function()
    assert done == ["task"]


@pytest.mark.parametrize("has_response", [True, False])
def test_interrupted_wait(make_app: AppFactory, has_response: bool) -> None:
    """A request waits for all else, in order, though one wait is interrupted."""
    app = make_late(make_app(APITASK_WAIT="close" if has_response else "teardown"))
    done: list[str] = []
    scopes: list[t.Any] = []

    @scoped(wait="close")
    def function(name: str) -> None:
        scopes.append(current_scope())
        run(done.append, name)

    def interrupt() -> t.NoReturn:
        raise KeyboardInterrupt

    @app.get("/")
    def index() -> str:
        run(done.append, "own")
        function("first")
        function("second")
        function("third")
        scopes[0].end = interrupt
        return "ok"

    def be_in_request() -> None:
        if has_response:
            serve(app, [])
        else:
            with app.test_request_context():
                index()

    # Flask 3.2 collects whatever a teardown raises.
    expected = BaseException if MERGED else KeyboardInterrupt

    with pytest.raises(expected, match=r"^$|Errors during"):
        be_in_request()

    assert done == ["second", "third", "own"]
    # As the interrupted wait would have.
    TaskScope.end(scopes[0])


def test_view_that_leaves_many_scopes(make_app: AppFactory) -> None:
    """Each is ended, however many of them end with the response."""
    app = make_late(make_app())
    done: list[int] = []
    function = scoped(wait="close")(lambda number: run(done.append, number))

    @app.get("/")
    def index() -> str:
        for number in range(1500):
            function(number)

        return "ok"

    app.test_client().get("/", buffered=True)
    assert done == list(range(1500))


def test_stream_starts_tasks_once_more(make_app: AppFactory) -> None:
    """What is started in a body with context is awaited, though a teardown fails.

    Flask 3.1.3 tears the request down before the body, and once more at its end.
    """
    app = make_late(make_app())
    events: list[str] = []

    @scoped(wait="close")
    def function() -> None:
        run(events.append, "task")

    @app.teardown_request
    def broken(exc: BaseException | None) -> None:
        if "body" in events:
            raise LookupError("another extension")

    @app.get("/")
    def index() -> Response:
        def generate() -> cabc.Iterator[str]:
            events.append("body")
            function()
            run(events.append, "task")
            yield "1"

        function()
        return Response(stream_with_context(generate()))

    exchange = Exchange(app)

    with pytest.raises(Exception, match=r"another extension|Errors during context"):
        exchange.read()

    exchange.close()
    assert events.count("task") == 3


def test_blocks_are_not_affected() -> None:
    """open_scope() and @scoped wait where they end, in an app that answers first."""
    app = answer_first()
    events: list[str] = []

    @app.get("/")
    @scoped
    def index() -> str:
        with open_scope():
            run(events.append, "block")

        events.append("end of block")
        run(events.append, "view")
        return "ok"

    serve(app, events)
    assert events == ["block", "end of block", "view", "returned", "sent", "closed"]


@pytest.mark.parametrize("wait", ["teardown", "", None, True])
def test_bad_wait_is_refused(wait: t.Any) -> None:
    """A word that is none of the two is an error of the decorator, at once."""
    with pytest.raises(ValueError, match=r"^wait is ") as excinfo:
        scoped(wait=wait)

    assert str(excinfo.value) == f"wait is {wait!r}, but must be 'return' or 'close'."


# Mail.


@pytest.mark.parametrize("how", ["send", "connect"])
@pytest.mark.parametrize("per_view", [True, False])
def test_mail_is_delivered_after_the_response(
    monkeypatch: pytest.MonkeyPatch, how: str, per_view: bool
) -> None:
    """Mail that is sent in the background goes out when the client has its answer."""
    monkeypatch.setattr(flask_mail, "Connection", flask_mail.Connection)

    with Mailbox() as inbox:
        app = Flask(__name__)
        app.config.update(
            APITASK_WAIT="teardown" if per_view else "close",
            APITASK_MAIL_BACKGROUND=True,
            APITASK_MAIL_KEEPALIVE=0,
            MAIL_SERVER="127.0.0.1",
            MAIL_PORT=inbox.port,
            MAIL_DEFAULT_SENDER="shop@example.org",
        )
        mail = flask_mail.Mail(app)
        ApiTask(app)
        make_late(app)

        def index() -> str:
            messages = [Message(name, ["ann@example.org"], "text") for name in "12"]

            with mail.connect() if how == "connect" else contextlib.nullcontext() as to:
                for message in messages:
                    (to or mail).send(message)

            return "ok"

        view = scoped(wait="close")(index) if per_view else index
        app.add_url_rule("/", "index", view)
        exchange = Exchange(app)
        assert exchange.read() == b"ok"
        assert inbox.subjects == []
        exchange.close()
        assert inbox.subjects == ["1", "2"]
