from __future__ import annotations

import contextlib
import contextvars
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
from flask_apitask import endings
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import ScopeClosed
from flask_apitask import scoped
from flask_apitask import task_finished
from flask_apitask import TaskScope
from flask_apitask import wait
from flask_apitask.closing import Closing
from flask_apitask.context import find_request_context
from flask_apitask.context import is_over
from flask_apitask.context import MERGED

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


def note_teardown(app: Flask, events: list[str]) -> None:
    """Note when the request's own app context is torn down, and not that of a task."""

    @app.before_request
    def before() -> None:
        g.of_request = True

    @app.teardown_appcontext
    def teardown(exc: BaseException | None) -> None:
        if "of_request" in g:
            events.append("teardown")


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

    def generate() -> cabc.Iterator[str]:
        yield "1"
        yield "2"

    def passed() -> Response:
        return Response([b"1", b"2"], direct_passthrough=True)

    def streamed() -> Response:
        return Response(stream_with_context(generate()))

    app.add_url_rule("/ok", "ok", lambda: "ok")
    app.add_url_rule("/redirect", "redirect", lambda: redirect("/ok", 302))
    app.add_url_rule("/abort", "abort", lambda: abort(418))
    app.add_url_rule("/boom", "boom", lambda: str(1 / 0))
    app.add_url_rule("/empty", "empty", lambda: ("", 204))
    app.add_url_rule("/unchanged", "unchanged", lambda: ("", 304))
    app.add_url_rule("/generated", "generated", lambda: Response(generate()))
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


def test_thread_that_closes_runs_tasks(make_app: AppFactory) -> None:
    """The server's thread does not only wait: it runs what no other has begun."""
    app = answer_first()
    runs: list[tuple[str, int]] = []

    @task_finished.connect_via(app)
    def note(sender: Flask, **fields: t.Any) -> None:
        runs.append((fields["how"], threading.get_ident()))

    def close() -> int:
        exchange.close()
        return threading.get_ident()

    app.add_url_rule("/", "index", answering(str))
    exchange = Exchange(app)
    assert runs == []
    closer = in_time(close)

    assert runs == [("helped", closer)]


def test_running_task_is_waited_for(make_app: AppFactory) -> None:
    """A task that a thread is busy with is waited for at the close."""
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
    in_time(exchange.close)
    assert done == [True]


def test_closing_twice_is_harmless() -> None:
    """A response that is closed twice waits once, and keeps nothing."""
    app = answer_first()
    done: list[str] = []
    app.add_url_rule("/", "index", answering(done.append, "task"))
    exchange = Exchange(app)
    exchange.close()
    exchange.close()

    assert done == ["task"]


def test_outer_context_keeps_no_request(make_app: AppFactory) -> None:
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
        gc.collect()
        assert references[0]() is None


def test_what_comes_while_another_thread_closes() -> None:
    """What is added while another thread is in the wait of a close ends at once."""
    closing = Closing()
    begun, gate = threading.Event(), threading.Event()
    ended: list[str] = []

    def wait() -> None:
        begun.set()
        assert gate.wait(PATIENCE)

    closing.add(wait)
    thread = threading.Thread(target=closing.close, daemon=True)
    thread.start()
    assert begun.wait(PATIENCE)
    closing.add(lambda: ended.append("late"))
    assert ended == ["late"]
    gate.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_what_comes_after_the_close_ends_at_once() -> None:
    """A closing that was closed calls what is added to it, in its own context."""
    variable = contextvars.ContextVar[str]("variable")
    variable.set("request")
    closing = Closing()
    variable.set("later")
    seen: list[str] = []
    closing.add(lambda: seen.append(variable.get()))
    assert seen == []
    closing.close()
    closing.close()
    closing.add(lambda: seen.append(variable.get()))
    assert seen == ["request", "request"]


def test_task_that_is_started_late() -> None:
    """What starts in a teardown function before ours is waited for at the close."""
    app = answer_first()
    events: list[str] = []
    app.add_url_rule("/", "index", lambda: "ok")
    app.teardown_request(starting(events.append, "task"))
    serve(app, events)

    assert events == IN_ORDER


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


def test_exception_that_is_propagated() -> None:
    """Where there is no response, the tasks are waited for in the teardown."""
    app = answer_first(PROPAGATE_EXCEPTIONS=True)
    events: list[str] = []
    note_return(app, events)
    app.before_request(starting(events.append, "task"))
    app.add_url_rule("/", "index", lambda: str(1 / 0))

    with pytest.raises(ZeroDivisionError):
        Exchange(app)

    assert events == ["task", "returned"]


@pytest.mark.parametrize("path", ["/", "/boom"])
def test_server_that_refuses_a_response(path: str) -> None:
    """Where the server does not take the response, the teardown waits."""
    app = answer_first()
    events: list[str] = []
    note_return(app, events)
    app.before_request(starting(events.append, "task"))
    app.add_url_rule("/boom", "boom", lambda: str(1 / 0))
    environ = EnvironBuilder(path=path).get_environ()

    def refuse(*args: object) -> t.NoReturn:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        app(environ, refuse)

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

    assert (
        events
        == {
            "finished": IN_ORDER,
            "unfinished": ["task", "returned", "sent", "closed"],
            "none": ["task"],
        }[page]
    )


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
    """What a generator starts ends with the response, also if the client has gone.

    Its teardown comes first, so that nothing of the request is held. Flask 3.1 tears
    the request down before the generator runs, and again at its end.
    """
    app = answer_first()
    events: list[str] = []
    note_teardown(app, events)

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

    in_teardown = [event for event in events if event != "teardown"]
    # The server is told of an exception in mid-body, and so is the teardown. It waits.
    assert in_teardown == [] or (reads == "all" and fails)
    exchange.close()
    tasks = [event for event in events if event != "teardown"]
    expected = {"all": ["view", "first", "second"], "first": ["view", "first"]}

    if fails and reads == "all":
        assert sorted(tasks) == ["first", "view"]
    else:
        assert tasks == expected.get(reads, ["view"])
        assert events[: -len(tasks)] == ["teardown"] * (len(events) - len(tasks))


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

    assert events == ["returned", "sent", "a", "closed", "returned", "sent", "b"] + [
        "closed"
    ]
    assert len(shared._on_close) == 1
    events.clear()
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
        events.append("end of block")

    if keeps == "open":
        response.close()

    assert "block" in events
    # That of a response that nobody has is left to the threads, and there are none.
    assert ("task" in events) is (keeps != "dropped")


# What a task can use, and what not.


@pytest.fixture(params=["threads", "helped"])
def work_after_close(
    request: pytest.FixtureRequest, make_app: AppFactory
) -> cabc.Callable[[cabc.Callable[[], object]], tuple[Flask, Future[t.Any]]]:
    """Return what makes a request, and has a function called once that is over."""

    def call(work: cabc.Callable[[], object]) -> tuple[Flask, Future[t.Any]]:
        app = make_app(APITASK_WAIT="close", SECRET_KEY="secret")
        over = threading.Event()
        futures: list[Future[t.Any]] = []

        if request.param == "helped":
            make_late(app)

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
        return app, futures[0]

    return call


def test_context_of_a_task_outlives_that_of_the_request(
    work_after_close: cabc.Callable[..., tuple[Flask, Future[t.Any]]],
) -> None:
    """A task finds app, request and session after the request's own end."""

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

    app, future = work_after_close(work)

    assert future.result(0) == {
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
    work_after_close: cabc.Callable[..., tuple[Flask, Future[t.Any]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A task that fails when the client has its answer is logged with the endpoint."""
    _, future = work_after_close(lambda: 1 / 0)

    assert isinstance(future.exception(0), ZeroDivisionError)
    (record,) = caplog.records
    assert vars(record)["endpoint"] == "index"
    assert record.levelname == "ERROR"


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


def test_connection_of_the_request_is_back(tmp_path: pathlib.Path) -> None:
    """While a request waits at its close, it holds no database connection."""
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    sqlalchemy = pytest.importorskip("sqlalchemy")
    app = answer_first(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'site.db'}")
    db = flask_sqlalchemy.SQLAlchemy(app)
    counts: list[int] = []

    def work() -> None:
        counts.append(db.engine.pool.checkedout())
        db.session.execute(sqlalchemy.text("select 1"))
        counts.append(db.engine.pool.checkedout())

    @app.get("/")
    def index() -> str:
        db.session.execute(sqlalchemy.text("select 1"))
        counts.append(db.engine.pool.checkedout())
        run(work)
        return "ok"

    serve(app, [])
    assert counts == [1, 0, 1]

    with app.app_context():
        assert db.engine.pool.checkedout() == 0
        db.engine.dispose()


# Deadlines, processes, memory.


def test_deadline_counts_from_the_close(caplog: pytest.LogCaptureFixture) -> None:
    """At the deadline after the close, what was not begun is cancelled, and logged."""
    app = answer_first(APITASK_TIMEOUT=0.01)
    futures: list[Future[t.Any]] = []

    @app.get("/")
    def index() -> str:
        futures.append(run(str))
        return "ok"

    exchange = Exchange(app)
    assert not futures[0].cancelled()
    assert caplog.records == []
    exchange.close()

    assert futures[0].cancelled()
    (record,) = caplog.records
    assert vars(record)["endpoint"] == "index"
    assert record.getMessage().endswith("was cancelled: not begun within 0.01 s.")


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


@pytest.fixture
def without_gc() -> cabc.Iterator[None]:
    """What is freed is freed by the count of its references."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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
        references.append(weakref.ref(flask.globals._cv_app.get()))
        run(work, argument, fails)
        return "ok"

    exchange = Exchange(app)
    assert references[0]() is not None
    exchange.close()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("how", ["request", "view"])
def test_app_goes_with_its_last_reference(
    closes: bool, how: str, without_gc: None
) -> None:
    """An app is freed without the garbage collector, closed responses or not."""
    gone = threading.Event()
    app = Flask(__name__)
    app.config["APITASK_WAIT"] = "close" if how == "request" else "teardown"
    ApiTask(app)

    def index() -> str:
        assert run(str, "ok").result(PATIENCE) == "ok"
        return "ok"

    view = index if how == "request" else scoped(index, wait="close")  # type: ignore[call-overload]
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


def make_view(app: Flask, events: list[str], *, is_async: bool = False) -> None:
    """Give an app a view whose own tasks end with its response, and others."""

    def work(name: str) -> None:
        run(events.append, f"{name} task")
        events.append(name)

        if request.args:
            raise LookupError

    @scoped(wait="close", max_workers=3)
    def view() -> str:
        assert "max_workers=3>" in repr(current_scope())
        work("view")
        return "ok"

    @scoped(wait="close", max_workers=3)
    async def async_view() -> str:
        assert "max_workers=3>" in repr(current_scope())
        work("view")
        return "ok"

    app.add_url_rule("/", "index", async_view if is_async else view)


@pytest.mark.parametrize("wait", ["teardown", "close"])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_view_that_answers_first(
    make_app: AppFactory, wait: str, fails: bool, is_async: bool, enabled: bool
) -> None:
    """The tasks of the view are awaited at the close, the others as configured."""
    app = make_late(make_app(APITASK_WAIT=wait, APITASK_ENABLED=enabled))
    events: list[str] = []
    make_view(app, events, is_async=is_async)
    app.before_request(starting(events.append, "other"))
    serve(app, events, "/?fails" if fails else "/")

    start, end = ["view", "returned", "sent", "view task"], ["closed"]

    if not enabled:
        assert events == ["other", *start, *end]
    elif wait == "close":
        assert events == [*start, "other", *end]
    else:
        assert events == ["view", "other", *start[1:], *end]


def test_view_sends_a_file(make_app: AppFactory, file: pathlib.Path) -> None:
    """A view can answer first with a file, in an app that does not."""
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/")
    @scoped(wait="close")
    def index() -> Response:
        run(events.append, "task")
        return send_file(file)

    serve(app, events)
    assert events == IN_ORDER


def test_views_own_scope_is_closed_when_it_returns(make_app: AppFactory) -> None:
    """A scope that a view left takes no task, though nobody waits for it yet."""
    app = make_late(make_app())
    scopes: list[t.Any] = []

    @app.get("/")
    @scoped(wait="close")
    def index() -> str:
        scopes.append(current_scope())
        run(str)
        return "ok"

    @app.after_request
    def after(response: Response) -> Response:
        assert current_scope() is not scopes[0]

        with pytest.raises(ScopeClosed):
            scopes[0].submit(str)

        return response

    assert serve(app, []).status == "200 OK"


def test_deadline_of_a_view(make_app: AppFactory) -> None:
    """The view's own deadline counts from the close."""
    app = make_late(make_app(APITASK_TIMEOUT=PATIENCE))
    futures: list[Future[t.Any]] = []

    @app.get("/")
    @scoped(wait="close", timeout=0.01)
    def index() -> str:
        futures.append(run(str))
        return "ok"

    exchange = Exchange(app)
    assert not futures[0].cancelled()
    exchange.close()
    assert futures[0].cancelled()


@pytest.mark.parametrize("is_async", [True, False])
def test_function_outside_of_a_request(make_app: AppFactory, is_async: bool) -> None:
    """Where no response comes, the tasks are done when the function returns."""
    app = make_late(make_app())
    other = make_app()
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

    with other.test_request_context(), app.app_context():
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
@pytest.mark.parametrize("first", [True, False])
def test_function_in_a_teardown(hook: str, first: bool) -> None:
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

    if first:
        getattr(app, hook)(teardown)

    ApiTask(app)

    if not first:
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


def test_task_that_a_teardown_starts() -> None:
    """It does not keep the answer, though its function is registered before ours."""
    app = Flask(__name__)
    app.config["APITASK_WAIT"] = "close"
    events: list[str] = []
    app.add_url_rule("/", "index", lambda: "ok")

    @app.teardown_request
    def late(exc: BaseException | None) -> None:
        run(events.append, "task")

    ApiTask(app)
    make_late(app)
    serve(app, events)
    assert events == IN_ORDER


def test_request_that_ends_while_a_function_leaves(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a function has started is ended by the request, or where it returns."""
    app = make_late(make_app())
    done: list[str] = []
    request_context = app.test_request_context()
    request_context.push()

    def end_first(ending: object) -> bool:
        monkeypatch.undo()
        request_context.pop()
        return is_over(ending)

    monkeypatch.setattr(endings, "is_over", end_first)

    @scoped(wait="close")
    def function() -> None:
        run(done.append, "task")

    function()
    assert done == ["task"]


def test_interrupted_wait_for_what_was_left(make_app: AppFactory) -> None:
    """A request waits for all else, in order, though one wait is interrupted."""
    app = make_late(make_app())
    done: list[str] = []
    scopes: list[t.Any] = []

    @scoped(wait="close")
    def function(name: str) -> None:
        scopes.append(current_scope())
        run(done.append, name)

    def interrupt() -> t.NoReturn:
        raise KeyboardInterrupt

    def be_in_request() -> None:
        with app.test_request_context():
            run(done.append, "own")
            function("first")
            function("second")
            function("third")
            scopes[0].end = interrupt

    with pytest.raises(KeyboardInterrupt):
        be_in_request()

    assert done == ["second", "third", "own"]
    # As the interrupted wait would have.
    TaskScope.end(scopes[0])


@pytest.mark.parametrize("left", [False, True])
def test_stream_starts_tasks_once_more(make_app: AppFactory, left: bool) -> None:
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

            if left:
                function()
            else:
                run(events.append, "task")

            yield "1"

        function()
        return Response(stream_with_context(generate()))

    exchange = Exchange(app)

    with pytest.raises(Exception, match=r"another extension|Errors during context"):
        exchange.read()

    assert "task" in events
    exchange.close()
    assert events.count("task") == 2


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

        def letter(subject: str) -> Message:
            return Message(subject, ["ann@example.org"], "text")

        def index() -> str:
            if how == "send":
                mail.send(letter("1"))
                mail.send(letter("2"))
            else:
                with mail.connect() as connection:
                    connection.send(letter("1"))
                    connection.send(letter("2"))

            return "ok"

        view = scoped(wait="close")(index) if per_view else index
        app.add_url_rule("/", "index", view)
        exchange = Exchange(app)
        assert exchange.read() == b"ok"
        assert inbox.subjects == []
        exchange.close()
        assert inbox.subjects == ["1", "2"]
