from __future__ import annotations

import contextlib
import contextvars
import http.client
import threading
import typing as t
import weakref
from concurrent.futures import ThreadPoolExecutor

import flask
import pytest
from conftest import PATIENCE
from flask import abort
from flask import after_this_request
from flask import copy_current_request_context
from flask import Flask
from flask import redirect
from flask import Request
from flask import stream_with_context
from late_threads import in_time
from late_threads import make_late
from late_threads import note_return
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import make_server
from werkzeug.test import Client

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import request_scope
from flask_apitask import run
from flask_apitask import TaskScope
from flask_apitask import wait
from flask_apitask.context import find_request_context
from flask_apitask.context import is_pushed_again
from flask_apitask.context import MERGED
from flask_apitask.task_runner import TaskRunner

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory
    from werkzeug.wrappers import Response

    from flask_apitask.request_scope import RequestScope

MODES = pytest.mark.parametrize("waits", ["teardown", "close"])
# As it is, or from Flask 3.2 on in an exception group.
TEARDOWN_ERRORS = "another extension|Errors during context teardown"


class Argument:
    """An object that can be referred to weakly."""


def add_outcomes(app: Flask, events: list[str]) -> None:
    """Give an app a view for each way to end, with a task started before all of them.

    Without threads, ``"task"`` is noted at the moment that somebody waits for it.
    """
    make_late(app)
    note_return(app, events)

    @app.before_request
    def start() -> None:
        run(events.append, "task")

    app.add_url_rule("/ok", "ok", lambda: "ok")
    app.add_url_rule("/redirect", "redirect", lambda: redirect("/ok", 302))
    app.add_url_rule("/abort", "abort", lambda: abort(418))
    app.add_url_rule("/boom", "boom", lambda: str(1 / 0))
    app.add_url_rule("/post", "post", lambda: "ok", methods=["POST"])


def raise_in_teardown(app: Flask) -> None:
    """Have a function that is called in the teardown of a request raise."""

    @app.teardown_request
    def broken(exc: BaseException | None) -> None:
        raise LookupError("another extension")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ok", 200),
        ("HEAD", "/ok", 200),
        ("OPTIONS", "/ok", 200),
        ("GET", "/redirect", 302),
        ("GET", "/abort", 418),
        ("GET", "/missing", 404),
        ("GET", "/post", 405),
        ("GET", "/boom", 500),
    ],
)
def test_tasks_are_done_when_the_app_returns(
    make_app: AppFactory, method: str, path: str, status: int
) -> None:
    """However a request ends, its tasks are done before the app does (behaviour 2)."""
    app = make_app()
    events: list[str] = []
    add_outcomes(app, events)
    response = app.test_client().open(path, method=method)

    assert response.status_code == status
    assert events == ["task", "returned"]


def test_tasks_are_done_when_an_exception_is_propagated(make_app: AppFactory) -> None:
    """With PROPAGATE_EXCEPTIONS the tasks are done when it raises (behaviour 2)."""
    app = make_app(PROPAGATE_EXCEPTIONS=True)
    events: list[str] = []
    add_outcomes(app, events)

    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/boom")

    assert events == ["task", "returned"]


def test_running_task_is_waited_for(make_app: AppFactory) -> None:
    """A running task is waited for too (behaviour 2)."""
    app = make_app()
    events: list[str] = []
    note_return(app, events)
    ending = threading.Event()

    def work() -> None:
        assert ending.wait(PATIENCE)
        events.append("task")

    @app.get("/")
    def index() -> str:
        run(work)
        return "ok"

    app.teardown_request(lambda exc: ending.set())
    app.test_client().get("/")

    assert events == ["task", "returned"]


def test_view_overlaps_its_tasks(make_app: AppFactory) -> None:
    """A task runs while the view goes on, and the view can use its result."""
    app = make_app()
    answered = threading.Event()

    def ask() -> str:
        assert answered.wait(PATIENCE)
        return "result"

    @app.get("/")
    def index() -> str:
        future = run(ask)
        answered.set()
        return future.result(PATIENCE)

    assert app.test_client().get("/").text == "result"


# Where run() works.


@pytest.mark.parametrize("how", ["sync", "async", "answers"])
def test_before_request_that_stands_before_ours(how: str) -> None:
    """A task that is started before our hook opens the scope (behaviour 3)."""
    app = Flask(__name__)
    scopes: list[object] = []
    events: list[str] = []

    @app.before_request
    def early() -> str | None:
        run(events.append, "early")
        scopes.append(current_scope())
        return "early" if how == "answers" else None

    @app.get("/")
    def index() -> str:
        run(events.append, "view")
        scopes.append(current_scope())
        return "view"

    if how == "async":
        app.before_request_funcs[None].clear()

        @app.before_request
        async def early_too() -> None:
            early()

    ApiTask(app)
    make_late(app)
    note_return(app, events)

    if how == "answers":
        assert app.test_client().get("/").text == "early"
        assert events == ["early", "returned"]
    else:
        assert app.test_client().get("/").text == "view"
        assert events == ["early", "view", "returned"]
        assert scopes[0] is scopes[1] is not None


def test_error_handlers_and_after_request(make_app: AppFactory) -> None:
    """run() works in an error handler and in after_request (behaviour 3)."""
    app = make_late(make_app())
    events: list[str] = []
    note_return(app, events)

    @app.errorhandler(404)
    def missing(error: Exception) -> tuple[str, int]:
        run(events.append, "errorhandler")

        @after_this_request
        def after_this(response: Response) -> Response:
            run(events.append, "after_this_request")
            return response

        return "nothing here", 404

    @app.after_request
    def after(response: Response) -> Response:
        run(events.append, "after_request")
        return response

    assert app.test_client().get("/missing").status_code == 404
    assert events == ["errorhandler", "after_this_request", "after_request", "returned"]


def test_test_request_context(make_app: AppFactory) -> None:
    """run() works in a test_request_context, and is waited for (behaviour 3)."""
    app = make_late(make_app())
    done: list[str] = []

    with app.test_request_context():
        run(done.append, "task")
        assert done == []

    assert done == ["task"]


def test_task_after_the_teardown_functions(make_app: AppFactory) -> None:
    """It is a plain call, because nothing would end the scope (behaviour 3)."""

    class LateRequest(Request):
        def close(self) -> None:
            super().close()
            run(events.append, "task")
            events.append("close")

    events: list[str] = []
    app = make_late(make_app())
    app.request_class = LateRequest
    note_return(app, events)
    app.test_client().get("/missing")
    assert events == ["task", "close", "returned"]


# Teardown functions of others.


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("extension_first", [False, True])
@pytest.mark.parametrize("hook", ["teardown_request", "teardown_appcontext"])
def test_task_of_a_teardown_function(
    hook: str, extension_first: bool, outer: bool
) -> None:
    """It is awaited if it starts before our function, else a plain call (behaviour 3).

    Also where an app context is around the request, that Flask < 3.2 then reuses.
    """
    app = Flask(__name__)
    app.add_url_rule("/", "index", lambda: "ok")
    events: list[str] = []

    def work() -> None:
        if "task" not in events:
            events.append("task")

    def late(exc: BaseException | None) -> None:
        # Such a function is called at the end of a task, too.
        if "started" not in events:
            events.append("started")
            run(work)
            events.append("left")

    if extension_first:
        ApiTask(app)

    getattr(app, hook)(late)

    if not extension_first:
        ApiTask(app)

    note_return(make_late(app), events)
    is_awaited = extension_first and hook == "teardown_request"
    expected = ["left", "task"] if is_awaited else ["task", "left"]

    with app.app_context() if outer else contextlib.nullcontext():
        app.test_client().get("/")

    events.remove("returned")
    assert events == ["started", *expected]


@pytest.mark.parametrize("extension_first", [False, True])
def test_order_of_teardown_functions(extension_first: bool) -> None:
    """What was registered after ApiTask comes before the wait, the rest after it."""
    app = Flask(__name__)
    events: list[str] = []

    @app.get("/")
    def index() -> str:
        run(events.append, "task")
        return "ok"

    if extension_first:
        ApiTask(app)

    app.teardown_request(lambda exc: events.append("teardown"))

    if not extension_first:
        ApiTask(app)

    make_late(app).test_client().get("/")
    expected = ["teardown", "task"]
    assert events == (expected if extension_first else expected[::-1])


@pytest.mark.parametrize("extension_first", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_another_teardown_that_raises(extension_first: bool, outer: bool) -> None:
    """Another's teardown_request that raises: the tasks are awaited (behaviour 5).

    In an app context around the request, Flask < 3.2 tears down only that.
    """
    app = Flask(__name__)
    events: list[str] = []
    seen: list[object] = []

    if extension_first:
        ApiTask(app)

    raise_in_teardown(app)

    if not extension_first:
        ApiTask(app)

    make_late(app)

    @app.get("/<name>")
    def index(name: str) -> str:
        assert current_scope() not in seen
        run(events.append, name)
        seen.append(current_scope())
        return "ok"

    with app.app_context() if outer else contextlib.nullcontext():
        for name in ("first", "second"):
            with pytest.raises(Exception, match=TEARDOWN_ERRORS):
                app.test_client().get(f"/{name}")

            if not outer:
                assert events.pop() == name

        assert current_scope() is None

    assert sorted(events) == (["first", "second"] if outer else [])


def test_requests_in_one_app_context_do_not_add_up(
    make_app: AppFactory, without_gc: None
) -> None:
    """An app context around many requests keeps none that has ended (behaviour 10)."""
    app = make_app()
    references: list[weakref.ref[RequestScope]] = []

    @app.get("/")
    def index() -> str:
        run(int)
        scope = request_scope.find_request_scope(find_request_context())
        references.append(weakref.ref(t.cast("t.Any", scope)._scope))
        return "ok"

    with app.app_context():
        for _ in range(3):
            app.test_client().get("/").close()
            assert references[-1]() is None


@pytest.mark.parametrize("fails", [False, True])
def test_scope_that_is_opened_in_a_teardown(
    make_app: AppFactory, fails: bool, without_gc: None
) -> None:
    """It is ended even if another function raises, and its request is freed (10)."""
    app = make_late(make_app())
    app.add_url_rule("/", "index", lambda: "ok")
    events: list[str] = []
    references: list[weakref.ref[t.Any]] = []
    note_return(app, events)

    if fails:
        raise_in_teardown(app)

    @app.teardown_request
    def late(exc: BaseException | None) -> None:
        run(events.append, "task")
        references.append(weakref.ref(find_request_context()))

    with contextlib.suppress(Exception):
        app.test_client().get("/").close()

    assert events == ["task", "returned"]

    # The errors that Flask 3.2 collects are in a cycle with their traceback.
    if not (MERGED and fails):
        assert references[0]() is None


# Contexts that are pushed more than once, or streamed with.


def test_client_that_preserves_the_context(make_app: AppFactory) -> None:
    """Ending a scope twice is harmless, as with a client's with block (behaviour 4)."""
    app = make_late(make_app())
    events: list[str] = []
    note_return(app, events)

    @app.get("/")
    def index() -> str:
        run(events.append, "task")
        return "ok"

    with app.test_client() as client:
        for _ in range(2):
            client.get("/")
            assert events == ["task", "returned"]
            assert flask.has_request_context()
            run(events.append, "block")
            wait()
            assert events == ["task", "returned", "block"]
            events.clear()

        run(events.append, "last")

    assert events == ["last"]


@pytest.mark.parametrize("consume", [True, False])
def test_stream_with_context(make_app: AppFactory, consume: bool) -> None:
    """A task of a generator with context is one like any other (behaviour 4).

    Flask 3.1.3 tears the request down before the generator runs, and once more at its
    end; others do so only at the end.
    """
    app = make_late(make_app())
    events: list[str] = []
    threads: list[int] = []

    def work(name: str) -> None:
        events.append(name)
        threads.append(threading.get_ident())

    @app.get("/")
    def index() -> flask.Response:
        def generate() -> cabc.Iterator[str]:
            run(work, "first")
            yield "1"
            run(work, "second")
            yield "2"

        run(work, "view")
        return flask.Response(stream_with_context(generate()))

    response = app.test_client().get("/", buffered=False)
    body = iter(response.response)
    assert next(body) == b"1"

    if consume:
        assert list(body) == [b"2"]

    response.close()
    assert events == (["view", "first", "second"] if consume else ["view", "first"])
    assert threading.get_ident() not in threads


@pytest.mark.skipif(MERGED, reason="A context is over for good from Flask 3.2 on.")
def test_context_that_is_pushed_anew(make_app: AppFactory) -> None:
    """It has a new scope if it is pushed, which only ``_cv_tokens`` tells."""
    app = make_late(make_app())
    request_context = app.test_request_context()
    events: list[str] = []

    with request_context:
        late = contextvars.copy_context()

    # A thread that outlives the request makes a plain call, as nobody would end it.
    late.run(run, events.append, "late")
    assert events == ["late"]

    with request_context:
        run(events.append, "anew")
        assert events == ["late"]

    assert events == ["late", "anew"]


@pytest.mark.skipif(MERGED, reason="A context is over for good from Flask 3.2 on.")
def test_context_that_is_popped_when_its_scope_begins_anew(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is late for the second push finds that the scope has ended."""
    app = make_app()
    request_context = app.test_request_context()

    with request_context:
        late = contextvars.copy_context()

    pushed: list[bool] = []

    def pop_meanwhile(context: object) -> bool:
        """Find it pushed at first; then another thread pops it."""
        pushed.append(is_pushed_again(context))
        return not pushed[1:] or pushed[-1]

    monkeypatch.setattr(request_scope, "is_pushed_again", pop_meanwhile)
    thread = late.run(run, threading.get_ident).result(PATIENCE)
    assert thread == threading.get_ident()
    assert pushed == [False, False]
    assert request_scope.find_request_scope(request_context).ended


@MODES
def test_generator_without_context(make_app: AppFactory, waits: str) -> None:
    """run() in a plain generator, after the request, is a plain call (behaviour 4)."""
    app = make_late(make_app(APITASK_WAIT=waits))
    events: list[str] = []

    @app.get("/")
    def index() -> flask.Response:
        def generate() -> cabc.Iterator[str]:
            run(events.append, "generator")
            yield "1"

        return flask.Response(generate())

    assert app.test_client().get("/").text == "1"
    assert events == ["generator"]


def test_context_that_is_pushed_twice(make_app: AppFactory) -> None:
    """A request is over when its context is popped for the last time."""
    app = make_late(make_app())
    raise_in_teardown(app)
    request_context = app.test_request_context()
    events: list[str] = []

    def push() -> None:
        with request_context:
            with request_context:
                run(events.append, "first")

            assert events == []
            run(events.append, "second")

    with pytest.raises(Exception, match=TEARDOWN_ERRORS):
        push()

    assert events == ["first", "second"]


@pytest.mark.skipif(MERGED, reason="Flask 3.2 refuses to pop it in another thread.")
def test_task_that_pushes_the_context_of_the_request(make_app: AppFactory) -> None:
    """It ends no scope, and does not wait for itself (behaviour 7)."""
    app = make_app()
    request_context = app.test_request_context()
    scopes: list[object] = []

    def work() -> None:
        with request_context:
            pass

    def be_in_request() -> None:
        with request_context:
            scopes.append(current_scope())
            run(work).result(PATIENCE)
            scopes.append(current_scope())

    in_time(be_in_request)
    assert scopes[0] is scopes[1] is not None


# Requests in requests, and contexts of other apps.


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("inner", ["same", "other", "mounted", "without extension"])
@MODES
def test_nested_request(
    make_app: AppFactory, waits: str, inner: str, starts: bool
) -> None:
    """A request in a view waits for its own tasks, and for no others (behaviour 6)."""
    outer_app = make_late(make_app(APITASK_WAIT=waits))

    if inner == "same":
        inner_app = outer_app
    elif inner == "without extension":
        inner_app = Flask(__name__)
    else:
        inner_app = make_late(make_app(APITASK_WAIT=waits))

    site = DispatcherMiddleware(outer_app, {"/mounted": inner_app})
    client = Client(site if inner == "mounted" else inner_app)
    events: list[str] = []

    @outer_app.get("/outer")
    def outer() -> str:
        scope = current_scope()
        run(events.append, "outer task")
        path = "/mounted/inner" if inner == "mounted" else "/inner"
        assert client.get(path, buffered=True).status_code == 200
        events.append("inner returned")
        assert current_scope() is scope
        run(events.append, "another outer task")
        return "ok"

    @inner_app.get("/inner")
    def inside() -> str:
        assert (current_scope() is None) is (inner == "without extension")

        if starts:
            run(events.append, "inner task")

        return "ok"

    assert Client(site).get("/outer", buffered=True).status_code == 200
    start = ["inner task"] if starts else []
    end = ["inner returned", "outer task", "another outer task"]
    assert events == [*start, *end]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_app_context_in_a_request(
    make_app: AppFactory, same: bool, is_first: bool
) -> None:
    """In another app's context, the request's scope is out of sight (behaviour 6).

    In one of its own app it is not, but from Flask 3.2 on there is no request in it.
    """
    app = make_late(make_app())
    events: list[str] = []
    is_seen = same and not MERGED

    with app.test_request_context():
        if not is_first:
            run(int)

        with (app if same else make_app()).app_context():
            run(events.append, "task")
            seen = current_scope()
            assert (seen is not None) is is_seen

        assert current_scope() is (seen or current_scope()) is not None
        assert events == ([] if is_seen else ["task"])

    assert events == ["task"]


@pytest.mark.parametrize("same", [True, False])
def test_request_inside_a_task(make_app: AppFactory, same: bool) -> None:
    """A request made by a task has a scope of its own, and waits (behaviour 6)."""
    app = make_app()
    inner_app = app if same else make_app()
    events: list[str] = []
    ending = threading.Event()

    def call() -> None:
        assert inner_app.test_client().get("/inner").status_code == 200
        events.append("inner returned")
        assert current_scope() is None

    @app.get("/outer")
    def outer() -> str:
        run(call).result(PATIENCE)
        return "ok"

    def work() -> None:
        assert ending.wait(PATIENCE)
        events.append("inner task")

    @inner_app.get("/inner")
    def inside() -> str:
        run(work)
        return "ok"

    inner_app.teardown_request(lambda exc: ending.set())
    assert app.test_client().get("/outer").status_code == 200
    assert events == ["inner task", "inner returned"]


def test_two_apps_have_two_pools(make_app: AppFactory) -> None:
    """A full pool of one app keeps no task of another from running (behaviour 9)."""
    apps = [make_app(APITASK_POOL_SIZE=1, APITASK_MAX_WORKERS=n) for n in (1, 2)]
    started = threading.Event()

    with apps[0].test_request_context():
        blocked = run(started.wait, PATIENCE)
        assert "max_workers=1>" in repr(current_scope())

        with apps[1].test_request_context():
            run(started.set)
            # Nobody waits for it in its own scope, which would get it a thread anyhow.
            assert started.wait(PATIENCE)
            assert "max_workers=2>" in repr(current_scope())

        assert blocked.result(PATIENCE) is True


# Copies of a request's context, and threads that share it.


@pytest.mark.parametrize("where", ["thread", "same thread", "copied variables"])
@MODES
def test_copied_request_context(make_app: AppFactory, waits: str, where: str) -> None:
    """A copied request context has nothing of the request's scope (behaviour 7)."""
    app = make_late(make_app(APITASK_WAIT=waits))
    events: list[str] = []

    @app.get("/")
    def index() -> str:
        scope = current_scope()
        run(events.append, "view")

        @copy_current_request_context
        def copied() -> None:
            assert current_scope() is not scope
            run(events.append, "copied")
            events.append("end of copy")

        if where == "same thread":
            copied()
        elif where == "thread":
            in_time(copied)
        else:
            in_time(contextvars.copy_context().run, copied)

        assert current_scope() is scope
        assert not t.cast("t.Any", scope).closed
        run(events.append, "view again")
        return "ok"

    assert app.test_client().get("/", buffered=True).status_code == 200
    assert events == ["end of copy", "copied", "view", "view again"]


def test_copied_context_variables_alone(make_app: AppFactory) -> None:
    """With a request's context variables, a thread is in it (behaviour 7)."""
    app = make_late(make_app())
    events: list[str] = []
    note_return(app, events)

    @app.get("/")
    def index() -> str:
        in_time(contextvars.copy_context().run, run, events.append, "task")
        return "ok"

    app.test_client().get("/")
    assert events == ["task", "returned"]


def test_copied_context_that_outlives_the_request(make_app: AppFactory) -> None:
    """A copied context in use after the request still has run() (behaviour 7)."""
    app = make_late(make_app())
    events: list[str] = []
    copies: list[cabc.Callable[[], None]] = []

    @app.get("/")
    def index() -> str:
        run(events.append, "view")
        copies.append(copy_current_request_context(lambda: (run(work), None)[1]))
        return "ok"

    def work() -> None:
        events.append("copied")

    app.test_client().get("/")
    assert events == ["view"]
    in_time(copies[0])
    assert events == ["view", "copied"]


def test_context_variables_that_outlive_the_request(make_app: AppFactory) -> None:
    """Once the request is over, run() is a plain call in them (behaviour 7)."""
    app = make_app()

    with app.test_request_context():
        run(int)
        context = contextvars.copy_context()

    assert context.run(current_scope) is None
    future = context.run(run, threading.get_ident)
    assert future.result(0) == threading.get_ident()


def test_foreign_executor(make_app: AppFactory) -> None:
    """A job of Flask-Executor ends no scope, and waits for none (behaviour 7)."""
    flask_executor = pytest.importorskip("flask_executor")
    app = make_late(make_app(EXECUTOR_MAX_WORKERS=1))
    executor = flask_executor.Executor(app)
    events: list[str] = []

    @app.get("/")
    def index() -> str:
        scope = current_scope()
        run(events.append, "view")
        executor.submit(run, events.append, "job").result(PATIENCE)
        executor.submit(events.append, "second job").result(PATIENCE)
        assert current_scope() is scope
        assert not t.cast("t.Any", scope).closed
        run(events.append, "view again")
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    executor.shutdown()
    assert sorted(events[:2]) == ["job", "second job"]
    assert events[2:] == ["view", "view again"]


def test_threads_that_open_the_scope_at_once(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads with the same contexts share the scope that the first one made."""
    app = make_late(make_app())
    events: list[str] = []
    scopes: list[object] = []

    def start(name: str) -> None:
        run(events.append, name)
        scopes.append(current_scope())

    class SlowRunner(TaskRunner):
        """Made by a thread that has seen no scope, while another one makes it."""

        def __init__(self, *args: t.Any) -> None:
            monkeypatch.undo()
            in_time(contextvars.copy_context().run, start, "second")
            super().__init__(*args)

    monkeypatch.setattr(request_scope, "TaskRunner", SlowRunner)

    with app.test_request_context():
        start("first")

    assert scopes[0] is scopes[1]
    assert events == ["second", "first"]


def test_request_that_ends_while_its_scope_is_opened(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then run() is a plain call, because nothing would end the scope (behaviour 7)."""
    app = make_app()
    opening, ended = threading.Event(), threading.Event()

    class SlowRunner(TaskRunner):
        """Made by a thread that has seen the request go on."""

        def __init__(self, *args: t.Any) -> None:
            monkeypatch.undo()
            opening.set()
            assert ended.wait(PATIENCE)
            super().__init__(*args)

    with ThreadPoolExecutor(1) as executor:
        with app.test_request_context():
            monkeypatch.setattr(request_scope, "TaskRunner", SlowRunner)
            variables = contextvars.copy_context()
            future = executor.submit(lambda: variables.run(run, threading.get_ident))
            assert opening.wait(PATIENCE)

        ended.set()
        thread = executor.submit(threading.get_ident)
        assert future.result(PATIENCE).result(0) == thread.result(PATIENCE)


def test_worker_does_not_end_the_scope_it_works_for(make_app: AppFactory) -> None:
    """The end of a task's app context ends no scope (behaviour 7)."""
    app = make_app(APITASK_MAX_WORKERS=1)

    @app.get("/")
    def index() -> list[bool]:
        scope = t.cast("TaskScope", current_scope())
        closed = []

        for _ in range(3):
            run(str).result(PATIENCE)
            wait()
            closed.append(scope.closed)

        assert current_scope() is scope
        return closed

    assert in_time(app.test_client().get, "/").json == [False, False, False]


# What is left behind.


@pytest.mark.parametrize("path", ["/ok", "/boom", "/missing"])
def test_no_scope_is_left_for_the_next_request(make_app: AppFactory, path: str) -> None:
    """The next request on the same thread has a scope of its own (behaviour 8)."""
    app = make_app()
    events: list[str] = []
    add_outcomes(app, events)
    scopes: list[object] = []
    app.before_request(lambda: scopes.append(current_scope()))
    client = app.test_client()

    for _ in range(2):
        client.get(path)
        assert current_scope() is None
        assert not flask.has_app_context()

    assert len(scopes) == 2
    assert scopes[0] is not scopes[1]
    assert events == ["task", "returned"] * 2


def test_no_context_variable_is_left(make_app: AppFactory) -> None:
    """A request leaves the thread's context variables as they were (behaviour 8)."""
    app = make_app()
    app.add_url_rule("/", "index", lambda: run(str).result(PATIENCE))
    app.add_url_rule("/missing", "missing", lambda: abort(404))

    def set_variables() -> dict[str, object]:
        variables = contextvars.copy_context().items()
        return {variable.name: value for variable, value in variables if value}

    before = set_variables()
    client = app.test_client()
    client.get("/")
    client.get("/missing")

    assert set_variables() == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("late", [False, True])
@MODES
def test_no_reference_to_an_argument_is_left(
    make_app: AppFactory,
    monkeypatch: pytest.MonkeyPatch,
    without_gc: None,
    fails: bool,
    late: bool,
    waits: str,
) -> None:
    """After the request, nothing refers to a task's arguments, or to it (8, 10)."""
    app = make_app(APITASK_WAIT=waits)

    if late:
        make_late(app)

    # The records hold the exception, and pytest holds the records.
    monkeypatch.setattr(app.logger, "disabled", True)
    references: list[weakref.ref[t.Any]] = []

    def work(argument: Argument, fails: bool) -> Argument:
        if fails:
            raise ValueError(argument)

        return argument

    @app.get("/")
    def index() -> str:
        argument = Argument()
        references.append(weakref.ref(argument))
        references.append(weakref.ref(find_request_context()))
        run(work, argument, fails)
        return "ok"

    client = app.test_client()
    client.get("/").close()
    client.get("/").close()
    assert [reference() for reference in references] == [None] * 4


@pytest.mark.parametrize("by_variable", [True, False])
@pytest.mark.parametrize("closes", [True, False])
@MODES
def test_app_goes_with_its_last_reference(
    monkeypatch: pytest.MonkeyPatch,
    without_gc: None,
    by_variable: bool,
    closes: bool,
    waits: str,
) -> None:
    """An app is freed without the garbage collector's help (behaviour 10).

    Also if a variable of the request, an error in it say, refers to the request, and
    if the server never closes the response.
    """
    variable: contextvars.ContextVar[object] = contextvars.ContextVar("variable")
    gone = threading.Event()
    app = Flask(__name__)
    app.config["APITASK_WAIT"] = waits
    ApiTask(app)
    monkeypatch.setattr(app.logger, "disabled", True)

    # Not by a decorator: app.get() would keep the app in a cell of this very frame.
    def index() -> str:
        if by_variable:
            variable.set(find_request_context())
        else:
            run(str)
            run(divmod, 1, 0)
            assert isinstance(run(divmod, 1, 0).exception(PATIENCE), ZeroDivisionError)

        return "ok"

    app.add_url_rule("/", "index", index)

    for _ in range(2):
        response = contextvars.copy_context().run(app.test_client().get, "/")

        if closes:
            response.close()

        del response

    # A thread that goes home may be the last to let go of it.
    reference = weakref.ref(app, lambda _: gone.set())
    del app
    assert gone.wait(PATIENCE)
    assert reference() is None


# Limits.


@pytest.mark.parametrize("late", [False, True])
def test_one_worker_is_one_at_a_time(make_app: AppFactory, late: bool) -> None:
    """With max_workers=1 tasks run one at a time, in order (behaviour 10)."""
    app = make_app(APITASK_MAX_WORKERS=1)
    events: list[int] = []
    overlaps: list[int] = []
    busy = threading.Lock()
    ending = threading.Event()

    if late:
        make_late(app)

    def work(number: int) -> None:
        if not busy.acquire(blocking=False):
            overlaps.append(number)
            return

        if number == 0:
            assert ending.wait(PATIENCE)

        events.append(number)
        busy.release()

    @app.get("/")
    def index() -> str:
        for number in range(50):
            run(work, number)

        return "ok"

    app.teardown_request(lambda exc: ending.set())
    app.test_client().get("/")

    assert overlaps == []
    assert events == list(range(50))


def test_concurrent_requests_share_the_pool(make_app: AppFactory) -> None:
    """Requests on a threaded server share the threads of the process (behaviour 10).

    Each has one of its own beyond those, while it waits and all of them are busy.
    """
    app = make_app(APITASK_POOL_SIZE=2, APITASK_MAX_WORKERS=4)
    arrived = threading.Semaphore(0)
    release = threading.Event()
    counting = threading.Lock()
    submitted = threading.Barrier(2, timeout=PATIENCE)
    running = most = ran = 0
    statuses: list[int] = []

    def work() -> None:
        nonlocal running, most, ran

        with counting:
            ran += 1
            running += 1
            most = max(most, running)

        arrived.release()
        assert release.wait(PATIENCE)

        with counting:
            running -= 1

    @app.get("/")
    def index() -> str:
        for _ in range(4):
            run(work)

        submitted.wait()
        return "ok"

    def request(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

        with contextlib.closing(connection):
            connection.request("GET", "/")
            statuses.append(connection.getresponse().status)

    with make_server("127.0.0.1", 0, app, threaded=True) as server:
        port = server.server_port
        serving = threading.Thread(target=server.serve_forever)
        clients = [threading.Thread(target=request, args=[port]) for _ in range(2)]

        for thread in (serving, *clients):
            thread.start()

        try:
            # As many as the pool has, and one for each of the two that wait.
            for _ in range(4):
                assert arrived.acquire(timeout=PATIENCE)
        finally:
            release.set()

            for client in clients:
                client.join(PATIENCE)

            server.shutdown()
            serving.join(PATIENCE)

    assert statuses == [200, 200]
    assert (most, ran) == (4, 8)
