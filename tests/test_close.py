"""``APITASK_WAIT = "close"``: the response is sent first, and tasks end after that."""

from __future__ import annotations

import contextlib
import functools
import gc
import http.client
import io
import os
import signal
import threading
import typing as t
import warnings

import flask_mail
import pytest
from conftest import PATIENCE
from conftest import wait_until
from flask import abort
from flask import Flask
from flask import g
from flask import got_request_exception
from flask import has_request_context
from flask import redirect
from flask import request
from flask import request_finished
from flask import Response
from flask import send_file
from flask import stream_with_context
from flask_mail import Message
from late_threads import in_time
from late_threads import make_late
from late_threads import note_return
from mailbox_server import Mailbox
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
from flask_apitask.closing import Closing
from flask_apitask.context import MERGED
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.request_scope import RequestScope

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib
    from concurrent.futures import Future

    View = cabc.Callable[[], t.Any]

TEARDOWN_ERRORS = "another extension|Errors during context"


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


class Site:
    """An app that answers first, whose tasks run when somebody waits, and what it does.

    :param view: Its only view, which starts one task if none is given.
    :param prepare: Called with the app before it gets its ``ApiTask``.
    :param late: Whether its tasks have a thread only while somebody waits.
    """

    def __init__(
        self,
        view: View | None = None,
        prepare: cabc.Callable[[Flask], object] = bool,
        late: bool = True,
        **config: t.Any,
    ) -> None:
        self.events: list[str] = []
        self.app = Flask(__name__)
        self.app.config.update({"APITASK_WAIT": "close", **config})
        prepare(self.app)
        ApiTask(self.app)
        self.app.add_url_rule("/", "index", view or self.start, methods=["GET", "POST"])

        if late:
            make_late(self.app)

    def start(self, name: t.Any = "task") -> str:
        """Start a task that notes its name: as a view, in one, or as a hook."""
        run(self.events.append, name or "task")
        return "ok"

    def hook(self, *args: object) -> None:
        self.start()

    def serve(self, path: str = "/", **request: t.Any) -> Exchange:
        """Serve a request to its end, and note what the server comes to do."""
        exchange = Exchange(self.app, path, **request)
        self.events.append("returned")
        exchange.read()
        self.events.append("sent")
        exchange.close()
        self.events.append("closed")
        return exchange


def starting(fn: cabc.Callable[..., object], *args: object) -> View:
    """Return a view that starts a task."""

    def view() -> str:
        run(fn, *args)
        return "ok"

    return view


def leaving(fn: cabc.Callable[..., t.Any], *args: object) -> t.Any:
    """Call a function whose tasks are left to the response."""
    return scoped(wait="close")(fn)(*args)


IN_ORDER = ["returned", "sent", "task", "closed"]
IN_TEARDOWN = ["task", "returned", "sent", "closed"]

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
    views: dict[str, View] = {
        "ok": lambda: "ok",
        "redirect": lambda: redirect("/ok", 302),
        "abort": lambda: abort(418),
        "boom": lambda: str(1 / 0),
        "empty": lambda: ("", 204),
        "unchanged": lambda: ("", 304),
        "generated": lambda: Response(iter("12")),
        "streamed": lambda: Response(stream_with_context(iter("12"))),
        "file": lambda: send_file(file),
        "passed": lambda: Response([b"1", b"2"], direct_passthrough=True),
    }

    for name, view in views.items():
        app.add_url_rule(f"/{name}", name, view)

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
    site = Site()
    add_outcomes(site.app, file).before_request(site.hook)
    plain_app = add_outcomes(Flask(__name__), file)
    options: dict[str, t.Any] = {"method": method, "headers": headers}
    exchange = site.serve(path, **options)
    plain, again = (Exchange(app, path, **options) for app in (plain_app, site.app))

    assert site.events == IN_ORDER
    assert (exchange.status, exchange.headers) == (plain.status, plain.headers)
    assert exchange.status.startswith(str(status))
    assert again.read() == plain.read()
    again.close()
    plain.close()


def test_body_is_with_the_client_before_the_task_ends() -> None:
    """A client on the network has the whole body while the task still runs."""
    received = threading.Event()
    site = Site(starting(received.wait, PATIENCE), late=False)

    with make_server("127.0.0.1", 0, site.app) as server:
        serving = threading.Thread(target=server.handle_request)
        serving.start()
        connection = http.client.HTTPConnection(
            "127.0.0.1", server.server_port, timeout=PATIENCE
        )

        try:
            with contextlib.closing(connection):
                connection.request("GET", "/")
                assert connection.getresponse().read() == b"ok"

            # The server's thread is held until the task is done.
            assert serving.is_alive()
        finally:
            received.set()
            serving.join(PATIENCE)

    assert not serving.is_alive()


def test_default_has_no_part_in_a_response() -> None:
    """An app that waits in the teardown, or has no scopes, hooks no response."""
    for config in ({"APITASK_WAIT": "teardown"}, {"APITASK_ENABLED": False}):
        assert not request_finished.has_receivers_for(Site(**config).app)


def test_running_task_is_waited_for() -> None:
    """A running task is waited for at the close, once."""
    begun, closing = threading.Event(), threading.Event()
    done: list[bool] = []

    def work() -> None:
        begun.set()
        assert closing.wait(PATIENCE)
        done.append(True)

    class Body(list[str]):
        """A body of which the close comes before that of the response."""

        def close(self) -> None:
            closing.set()

    def view() -> Response:
        run(work)
        return Response(Body(["body"]))

    site = Site(view, late=False)
    exchange = Exchange(site.app)
    assert begun.wait(PATIENCE)
    assert exchange.read() == b"body"

    for _ in range(2):
        in_time(exchange.close)
        assert done == [True]


@pytest.mark.parametrize("early", [True, False])
def test_task_of_a_teardown_function(early: bool) -> None:
    """Before ours it starts what ends with the response, after it a plain call."""
    site: Site

    def hook(app: Flask) -> None:
        app.teardown_request(lambda exc: site.hook())

    site = Site(lambda: "ok", prepare=hook if early else bool)

    if not early:
        hook(site.app)

    site.serve()
    assert site.events == (IN_TEARDOWN if early else IN_ORDER)


def test_scope_is_closed_with_the_request() -> None:
    """After the request a task is refused, even while it waits for earlier ones."""
    scopes: list[t.Any] = []

    def view() -> str:
        scopes.append(current_scope())
        return "ok"

    exchange = Exchange(Site(view).app)

    with pytest.raises(ScopeClosed):
        scopes[0].submit(str)

    exchange.close()


# What keeps a response from being sent.


@pytest.mark.parametrize("how", ["propagated", "refused", "refused error page"])
def test_response_that_is_not_sent(how: str) -> None:
    """If there is no response, or the server refuses it, the teardown waits."""
    site = Site(
        lambda: "ok" if how == "refused" else str(1 / 0),
        PROPAGATE_EXCEPTIONS=how == "propagated",
    )
    site.app.before_request(site.hook)
    note_return(site.app, site.events)

    def refuse(*args: object) -> t.NoReturn:
        raise ConnectionResetError

    with pytest.raises((ConnectionResetError, ZeroDivisionError)):
        site.app(EnvironBuilder().get_environ(), refuse)

    assert site.events == ["task", "returned"]


@pytest.mark.parametrize("page", ["finished", "unfinished", "none"])
def test_response_that_takes_the_place_of_another(
    monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    """If a finished response is not sent, the tasks end with the one that is.

    And in the teardown, if that is not finished or if there is none.
    """
    site = Site(PROPAGATE_EXCEPTIONS=page == "none")
    finalize, attempts = site.app.finalize_request, []

    def fail_late(*args: t.Any, **kwargs: t.Any) -> Response:
        response = finalize(*args, **kwargs)
        attempts.append(response)

        if len(attempts) == 1:
            raise LookupError

        return response

    @site.app.after_request
    def after(response: Response) -> Response:
        if attempts and page == "unfinished":
            raise LookupError

        return response

    monkeypatch.setattr(site.app, "finalize_request", fail_late)

    with pytest.raises(LookupError) if page == "none" else contextlib.nullcontext():
        assert site.serve().status.startswith("500")

    expected = {"finished": IN_ORDER, "unfinished": IN_TEARDOWN, "none": ["task"]}
    assert site.events == expected[page]


def test_contexts_without_a_response() -> None:
    """In a test_request_context the tasks are done at the end of the block.

    And the signal that tells of an exception may be sent where there is no request.
    """
    site = Site()

    with site.app.test_request_context():
        site.start()
        assert site.events == []

    assert site.events == ["task"]

    with site.app.app_context():
        assert got_request_exception.send(site.app, exception=LookupError())


@pytest.mark.parametrize("how", ["teardown_request", "teardown_appcontext"])
def test_another_teardown_that_raises(how: str) -> None:
    """No task is lost if a failing teardown keeps the response back."""
    done = threading.Event()
    site = Site(starting(done.set), late=False)

    @site.app.before_request
    def before() -> None:
        g.of_request = True

    def broken(exc: BaseException | None) -> None:
        if "of_request" in g:
            raise LookupError("another extension")

    getattr(site.app, how)(broken)

    with pytest.raises(Exception, match=TEARDOWN_ERRORS):
        Exchange(site.app)

    assert done.wait(PATIENCE)


# Bodies that are made while they are sent.


@pytest.mark.parametrize("reads", ["all", "first", "none"])
@pytest.mark.parametrize("fails", [True, False])
def test_stream_with_context(reads: str, fails: bool) -> None:
    """What a generator starts is done with the response, also if the client has gone.

    Flask 3.1.3 tears the request down before the generator runs, and again at its end.
    If it raises, the server is told of that, and so is the teardown, which waits.
    """

    def generate() -> cabc.Iterator[str]:
        site.start("first")
        yield "1"

        if fails:
            raise LookupError

        site.start("second")
        yield "2"

    site = Site(
        lambda: site.start("view") and Response(stream_with_context(generate()))
    )
    exchange = Exchange(site.app)
    body = iter(exchange.iterable)

    if reads != "none":
        assert next(body) == b"1"

    if reads == "all":
        with pytest.raises(LookupError) if fails else contextlib.nullcontext():
            assert list(body) == [b"2"]

    started = [] if reads == "none" else ["first"]
    started += ["second"] if reads == "all" and not fails else []

    if reads == "all" and fails:
        assert "first" in site.events
    else:
        assert site.events == []

    exchange.close()
    assert sorted(site.events) == sorted(["view", *started])


class OwnFile:
    """A server's own wrapper for files, which it recognizes by its class."""

    def __init__(self, file: t.IO[bytes], size: int = 8192) -> None:
        self._file = file
        self.close = file.close

    def __iter__(self) -> cabc.Iterator[bytes]:
        return iter(functools.partial(self._file.read, 4), b"")


@pytest.mark.parametrize("works", [True, False])
def test_file_is_left_to_the_server(file: pathlib.Path, works: bool) -> None:
    """A file is sent in the server's own way, unless there is a task to wait for."""
    site = Site(lambda: [works and site.start()] and send_file(file))
    exchange = Exchange(site.app, environ_base={"wsgi.file_wrapper": OwnFile})
    assert isinstance(exchange.iterable, OwnFile) is not works
    assert exchange.read() == b"0123456789"
    assert site.events == []
    exchange.close()
    assert site.events == (["task"] if works else [])


# What servers, middleware and clients do.


def test_middleware_that_drops_the_close() -> None:
    """If a middleware never closes the response, the threads still do the tasks."""
    release, last = threading.Event(), threading.Event()

    def view() -> str:
        run(release.wait, PATIENCE)
        site.start()
        run(last.set)
        return "ok"

    def drop(environ: t.Any, start_response: t.Any) -> t.Any:
        return list(inner(environ, start_response))

    site = Site(view, late=False, APITASK_MAX_WORKERS=1)
    inner, site.app.wsgi_app = site.app.wsgi_app, drop  # type: ignore[method-assign]
    # It says that a scope was never ended, if so.
    gc.collect()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        site.serve()

    assert "task" not in site.events
    release.set()
    assert last.wait(PATIENCE)
    assert "task" in site.events


def test_one_response_for_all_requests() -> None:
    """An app may answer all requests with one object, even at the same time."""
    shared = Response("ok")
    site = Site(lambda: site.start(request.args["name"]) and shared)

    for name in "ab":
        site.serve(f"/?name={name}")
        assert site.events == ["returned", "sent", name, "closed"]
        site.events.clear()

    assert len(shared._on_close) == 1
    first, second = (Exchange(site.app, f"/?name={name}") for name in "ab")
    assert site.events == []

    for exchange in (first, second):
        exchange.close()
        assert site.events == ["a", "b"]


def test_response_closed_before_the_teardown() -> None:
    """If the response is closed already, the teardown waits."""
    shared = Response("ok")
    site = Site(lambda: site.start() and shared)
    note_return(site.app, site.events)
    # Called before ours. Another request, with the same response, is over now.
    site.app.teardown_request(lambda exc: shared.close())
    Exchange(site.app)
    assert site.events == ["task", "returned"]


@pytest.mark.parametrize("during", [True, False])
def test_scope_that_comes_late(during: bool) -> None:
    """A scope added to a response that is closed, or being closed, is ended at once."""
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
    thread.start()
    assert begun.wait(PATIENCE)

    if not during:
        gate.set()
        thread.join(PATIENCE)

    # On a thread beyond the pool's size, while the first is busy.
    future = late.submit(str)
    closing.add(late)
    assert future.done()
    gate.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    closing.close()


@pytest.mark.parametrize("how", ["with", "close", "buffered", "data"])
def test_client_waits_once_it_closes(how: str) -> None:
    """The client of Flask waits where it closes the response; its text is too early."""
    site = Site()
    response = site.app.test_client().get("/", buffered=how == "buffered")
    assert response.text == "ok"
    assert site.events == (["task"] if how == "buffered" else [])

    if how == "with":
        with response:
            assert site.events == []
    elif how == "close":
        response.close()

    assert site.events == ([] if how == "data" else ["task"])
    response.close()
    assert site.events == ["task"]


@pytest.mark.parametrize("keeps", ["closed", "dropped", "open"])
def test_client_that_preserves_the_context(keeps: str) -> None:
    """What runs in a client's with block is done at its end, or with the response."""
    site = Site()

    with site.app.test_client() as client:
        response: t.Any = client.get("/")
        assert site.events == []

        if keeps == "closed":
            response.close()
            assert site.events == ["task"]
        elif keeps == "dropped":
            response = None

        assert has_request_context()
        site.start("block")

    if keeps == "open":
        response.close()

    assert "block" in site.events
    # That of a response that nobody has is left to the threads, and there are none.
    assert ("task" in site.events) is (keeps != "dropped")


# What a task can use; deadlines and forks.


def test_uploads_are_closed() -> None:
    """Uploads are closed before the tasks at the close run: read them in the view."""

    def view() -> str:
        stream = request.files["file"].stream
        run(lambda: seen.append(stream.closed))
        return "ok"

    site, seen = Site(view), list[bool]()
    site.serve(method="POST", data={"file": (io.BytesIO(b"upload"), "name.txt")})
    assert seen == [True]


@pytest.mark.parametrize("per_view", [True, False])
def test_deadline_counts_from_the_close(
    caplog: pytest.LogCaptureFixture, per_view: bool
) -> None:
    """At the deadline after the close, tasks not started are cancelled and logged."""
    futures: list[Future[t.Any]] = []
    release = threading.Event()

    def view() -> str:
        futures.extend([run(release.wait, PATIENCE), run(int)])
        return "ok"

    limits: dict[str, t.Any] = {"wait": "close", "timeout": 0.01, "max_workers": 1}
    site = Site(
        scoped(**limits)(view) if per_view else view,
        late=False,
        APITASK_MAX_WORKERS=8 if per_view else 1,
        APITASK_TIMEOUT=PATIENCE if per_view else 0.01,
        APITASK_WAIT="teardown" if per_view else "close",
    )
    exchange = Exchange(site.app)
    assert not futures[1].cancelled()
    assert caplog.records == []
    wait_until(futures[0].running)
    exchange.close()
    assert futures[1].cancelled()
    release.set()
    cancelled, running = caplog.records
    assert vars(cancelled)["apitask_endpoint"] == "index"
    source = "timeout of the scope" if per_view else "APITASK_TIMEOUT"
    assert cancelled.getMessage().endswith(f"within 0.01 s ({source}).")
    assert running.getMessage().startswith("Stopped waiting for the tasks of GET /")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_between_response_and_close() -> None:
    """A child forked before the close leaves the tasks to its parent."""
    site = Site()
    exchange = Exchange(site.app)

    with warnings.catch_warnings():
        # Of other threads of the tests, from Python 3.12 on.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()

    if child == 0:
        signal.alarm(int(PATIENCE))
        exchange.close()
        os._exit(len(site.events))

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert site.events == []
    exchange.close()
    assert site.events == ["task"]


# One view.


@pytest.mark.parametrize("waits", ["teardown", "close"])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_view_that_answers_first(
    waits: str, fails: bool, is_async: bool, enabled: bool
) -> None:
    """The tasks of the view are awaited at the close, the others as configured."""

    def work() -> str:
        assert "max_workers=3>" in repr(current_scope())
        site.start("view task")
        site.events.append("view")

        if fails:
            raise LookupError

        return "ok"

    @scoped(wait="close", max_workers=3)
    async def async_view() -> str:
        return work()

    view = async_view if is_async else scoped(wait="close", max_workers=3)(work)
    site = Site(view, APITASK_WAIT=waits, APITASK_ENABLED=enabled)
    site.app.before_request(lambda: site.hook())
    site.serve()
    expected = ["view", "returned", "sent", "view task", "closed"]
    places = {(False, waits): 0, (True, "teardown"): 1, (True, "close"): 4}
    expected.insert(places[enabled, waits], "task")
    assert site.events == expected


def test_view_sends_a_file(file: pathlib.Path) -> None:
    """A view can answer first with a file, in an app that does not.

    Its scope takes no task once it is left, though nobody waits for it yet.
    """
    scopes: list[t.Any] = []

    @scoped(wait="close")
    def view() -> Response:
        site.start()
        scopes.append(current_scope())
        return send_file(file)

    site = Site(view, APITASK_WAIT="teardown")

    @site.app.after_request
    def after(response: Response) -> Response:
        assert current_scope() is not scopes[0]

        with pytest.raises(ScopeClosed):
            scopes[0].submit(str)

        return response

    site.serve()
    assert site.events == IN_ORDER


@pytest.mark.parametrize("is_async", [True, False])
def test_function_outside_of_a_request(is_async: bool) -> None:
    """Where no response comes, the tasks are done when the function returns."""
    site = Site(APITASK_WAIT="teardown")

    @scoped(wait="close")
    async def async_function() -> None:
        site.start()

    for outer in (contextlib.nullcontext(), Site().app.test_request_context()):
        with outer, site.app.app_context():
            if is_async:
                site.app.ensure_sync(async_function)()
            else:
                leaving(site.start)

        assert site.events.pop() == "task"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_function_in_a_context_without_a_response(enabled: bool, inner: bool) -> None:
    """Tasks left to a response that never comes end with the request."""
    site = Site(APITASK_WAIT="teardown", APITASK_ENABLED=enabled)

    with site.app.test_request_context():
        with site.app.app_context() if inner else contextlib.nullcontext():
            leaving(site.start)
            leaving(site.start)

        # There is no request in the inner one, from Flask 3.2 on.
        assert site.events == (["task"] * 2 if inner and MERGED else [])

    assert site.events == ["task"] * 2


@pytest.mark.parametrize("hook", ["teardown_request", "teardown_appcontext"])
@pytest.mark.parametrize("early", [True, False])
def test_function_in_a_teardown(hook: str, early: bool) -> None:
    """A function that is called in a teardown, before ours or after it, loses none."""
    main = threading.current_thread()
    site: Site

    def register(app: Flask) -> None:
        getattr(app, hook)(teardown)

    def teardown(exc: BaseException | None) -> None:
        if threading.current_thread() is main and not site.events:
            leaving(site.start)

    site = Site(
        lambda: "ok", prepare=register if early else bool, APITASK_WAIT="teardown"
    )

    if not early:
        register(site.app)

    site.serve()
    assert site.events == IN_TEARDOWN


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("in_view", [False, True])
def test_function_in_a_task(in_view: bool, in_block: bool) -> None:
    """In a task, a scoped function waits when it returns: it has no response."""

    def work() -> None:
        with open_scope() if in_block else contextlib.nullcontext():
            leaving(site.start, "inner")
            site.events.append("task")

    def view() -> str:
        run(work)

        if in_view:
            wait()

        return site.start("next")

    site = Site(view, APITASK_WAIT="teardown")
    site.serve()
    assert site.events[:3] == ["inner", "task", "next"]


def test_request_inside_a_task() -> None:
    """A view leaves its tasks to its response, in a task of another request, too."""
    site = Site(lambda: starting(site.serve, "/inner")(), APITASK_WAIT="teardown")
    site.app.add_url_rule("/inner", "inner", scoped(wait="close")(lambda: site.start()))
    site.app.test_client().get("/")
    assert site.events == IN_ORDER


def test_request_that_ends_while_a_function_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a function has started is ended by the request, or where it returns."""
    site = Site(APITASK_WAIT="teardown")
    defer = RequestScope.defer
    request_context = site.app.test_request_context()
    request_context.push()

    def end_first(self: RequestScope, scope: TaskScope) -> None:
        request_context.pop()
        assert site.events == []
        defer(self, scope)

    monkeypatch.setattr(RequestScope, "defer", end_first)
    leaving(site.start)
    assert site.events == ["task"]


@pytest.mark.parametrize("waits", ["teardown", "close"])
def test_interrupted_wait(waits: str) -> None:
    """If one wait is interrupted, a request still waits for the others, in order."""
    scopes: list[t.Any] = []

    def interrupt() -> t.NoReturn:
        raise KeyboardInterrupt

    def function(name: str) -> None:
        scopes.append(current_scope())
        site.start(name)

    def view() -> str:
        site.start("own")

        for name in ("first", "second", "third"):
            leaving(function, name)

        scopes[0].end = interrupt
        return "ok"

    def be_in_request() -> None:
        with site.app.test_request_context():
            view()

    site = Site(view, APITASK_WAIT=waits)
    # Flask 3.2 collects whatever a teardown raises.
    expected = BaseException if MERGED else KeyboardInterrupt

    with pytest.raises(expected, match=r"^$|Errors during"):
        site.serve() if waits == "close" else be_in_request()

    started = [event for event in site.events if event not in ("returned", "sent")]
    assert started == ["second", "third", "own"]
    # As the interrupted wait would have.
    TaskScope.end(scopes[0])


def test_view_that_leaves_many_scopes() -> None:
    """Each is ended, however many of them end with the response."""
    numbers = list(range(1, 1500))
    site = Site(lambda: str([leaving(site.start, number) for number in numbers]))
    site.app.test_client().get("/", buffered=True)
    assert t.cast("list[t.Any]", site.events) == numbers


def test_stream_starts_tasks_once_more() -> None:
    """What is started in a body with context is awaited, though a teardown fails.

    Flask 3.1.3 tears the request down before the body, and once more at its end.
    """

    def generate() -> cabc.Iterator[str]:
        site.events.append("body")
        leaving(site.start)
        site.start()
        yield "1"

    site = Site(
        lambda: leaving(site.start) and Response(stream_with_context(generate())),
        APITASK_WAIT="teardown",
    )

    @site.app.teardown_request
    def broken(exc: BaseException | None) -> None:
        if "body" in site.events:
            raise LookupError("another extension")

    exchange = Exchange(site.app)

    with pytest.raises(Exception, match=TEARDOWN_ERRORS):
        exchange.read()

    exchange.close()
    assert site.events.count("task") == 3


def test_blocks_are_not_affected() -> None:
    """open_scope() and @scoped wait where they end, in an app that answers first."""

    @scoped
    def view() -> str:
        with open_scope():
            site.start("block")

        site.events.append("end of block")
        return site.start()

    site = Site(view)
    site.serve()
    assert site.events == ["block", "end of block", *IN_TEARDOWN]


@pytest.mark.parametrize("wait", ["teardown", "", None, True])
def test_bad_wait_is_refused(wait: t.Any) -> None:
    """Any other word is an error of the decorator, at once."""
    with pytest.raises(ValueError, match=r"^wait is ") as excinfo:
        scoped(wait=wait)

    assert str(excinfo.value) == f"wait is {wait!r}, but must be 'return' or 'close'."


@pytest.mark.parametrize("how", ["send", "connect"])
@pytest.mark.parametrize("per_view", [True, False])
def test_mail_is_delivered_after_the_response(
    monkeypatch: pytest.MonkeyPatch, how: str, per_view: bool
) -> None:
    """Background mail is sent when the client has its answer."""
    monkeypatch.setattr(flask_mail, "Connection", flask_mail.Connection)
    mail = flask_mail.Mail()

    def view() -> str:
        messages = [Message(name, ["ann@example.org"], "text") for name in "12"]

        with mail.connect() if how == "connect" else contextlib.nullcontext() as to:
            for message in messages:
                (to or mail).send(message)

        return "ok"

    with Mailbox() as inbox:
        site = Site(
            scoped(wait="close")(view) if per_view else view,
            prepare=mail.init_app,
            APITASK_WAIT="teardown" if per_view else "close",
            APITASK_MAIL_BACKGROUND=True,
            APITASK_MAIL_KEEPALIVE=0,
            MAIL_SERVER="127.0.0.1",
            MAIL_PORT=inbox.port,
            MAIL_DEFAULT_SENDER="shop@example.org",
        )
        exchange = Exchange(site.app)
        assert exchange.read() == b"ok"
        assert inbox.subjects == []
        exchange.close()
        assert inbox.subjects == ["1", "2"]
