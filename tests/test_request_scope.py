from __future__ import annotations

import contextlib
import contextvars
import gc
import http.client
import threading
import typing as t
import weakref

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
from werkzeug.test import EnvironBuilder

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import endings
from flask_apitask import run
from flask_apitask import stack
from flask_apitask import TaskScope
from flask_apitask import wait
from flask_apitask.context import find_request_context
from flask_apitask.context import is_over
from flask_apitask.context import mark_over
from flask_apitask.context import MERGED

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory
    from werkzeug.wrappers import Response


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
    """A task that a thread is busy with is waited for, too (behaviour 2)."""
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


def test_before_request_that_stands_before_ours() -> None:
    """run() works in a function registered before ApiTask (behaviour 3)."""
    app = Flask(__name__)
    scopes: list[object] = []
    events: list[str] = []

    @app.before_request
    def early() -> None:
        run(events.append, "early")
        scopes.append(current_scope())

    @app.get("/")
    def index() -> str:
        run(events.append, "view")
        scopes.append(current_scope())
        return "ok"

    ApiTask(app)
    make_late(app)
    note_return(app, events)
    app.test_client().get("/")

    assert events == ["early", "view", "returned"]
    assert scopes[0] is scopes[1]
    assert scopes[0] is not None


def test_async_before_request_that_stands_before_ours() -> None:
    """What an async function registered before ApiTask runs, is done (behaviour 3)."""
    app = Flask(__name__)
    events: list[str] = []

    @app.before_request
    async def early() -> None:
        run(events.append, "early")

    ApiTask(app)
    make_late(app)
    note_return(app, events)
    app.add_url_rule("/", "index", lambda: "ok")
    app.test_client().get("/")

    assert events == ["early", "returned"]


def test_before_request_that_answers() -> None:
    """run() works in a function that answers before ours is called (behaviour 3)."""
    app = Flask(__name__)
    events: list[str] = []

    @app.before_request
    def early() -> str:
        run(events.append, "early")
        return "early"

    ApiTask(app)
    make_late(app)
    note_return(app, events)

    assert app.test_client().get("/").text == "early"
    assert events == ["early", "returned"]


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


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("register_first", [False, True])
@pytest.mark.parametrize("hook", ["teardown_request", "teardown_appcontext"])
def test_teardown_functions(hook: str, register_first: bool, outer: bool) -> None:
    """run() works in a function called before or after ours (behaviour 3).

    Also where an app context is around the request, that Flask < 3.2 then reuses.
    """
    app = Flask(__name__)
    app.add_url_rule("/", "index", lambda: "ok")
    done: list[str] = []

    def late(exc: BaseException | None) -> None:
        run(done.append, "task")

    def register() -> None:
        getattr(app, hook)(late)

    if register_first:
        register()

    ApiTask(app)

    if not register_first:
        register()

    make_late(app)

    # Such a function is called at the end of a task, too.
    if not outer:
        app.test_client().get("/")
        assert set(done) == {"task"}
        return

    with app.app_context():
        app.test_client().get("/")

        if hook == "teardown_request":
            assert done == ["task"]

    assert "task" in done


@pytest.mark.parametrize("register_first", [False, True])
def test_teardown_functions_come_before_the_wait(register_first: bool) -> None:
    """What a request holds can be given back before the wait, by whatever function."""
    app = Flask(__name__)
    events: list[str] = []

    @app.get("/")
    def index() -> str:
        run(events.append, "task")
        return "ok"

    def register() -> None:
        app.teardown_request(lambda exc: events.append("teardown"))

    if register_first:
        register()

    ApiTask(app)

    if not register_first:
        register()

    make_late(app).test_client().get("/")
    assert events == ["teardown", "task"]


def test_task_after_the_teardown_functions(make_app: AppFactory) -> None:
    """It is a plain call, as nobody would end the scope (behaviour 3)."""

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


class ClosingFlask(Flask):
    """An app that starts a task when a request is torn down."""

    def do_teardown_request(self, *args: t.Any, **kwargs: t.Any) -> None:
        super().do_teardown_request(*args, **kwargs)
        self.start_task()

    def start_task(self) -> None:
        run(self.config["EVENTS"].append, "task")


@pytest.mark.parametrize("replaced", [False, True])
def test_another_teardown_of_the_app(replaced: bool) -> None:
    """That of a subclass, and what an extension has put in its place, are called."""
    app = ClosingFlask(__name__) if not replaced else Flask(__name__)
    app.config["EVENTS"] = events = list[str]()
    note_return(app, events)

    if replaced:
        method = app.do_teardown_request

        def replacement(*args: t.Any, **kwargs: t.Any) -> None:
            method(*args, **kwargs)
            ClosingFlask.start_task(t.cast("ClosingFlask", app))

        app.do_teardown_request = replacement  # type: ignore[method-assign]

    ApiTask(app)
    make_late(app).test_client().get("/missing")
    assert events == ["task", "returned"]


@pytest.mark.skipif(MERGED, reason="Such a context has a request there.")
def test_teardown_in_the_request_of_another_app(make_app: AppFactory) -> None:
    """A stream that is closed in a request of another app ends no scope of that."""
    app, other = make_late(make_app()), make_app()
    streams: list[cabc.Iterator[bytes]] = []

    @other.get("/")
    def stream() -> Response:
        return flask.Response(stream_with_context(iter("12")))

    def begin() -> None:
        body = other.wsgi_app(EnvironBuilder("/").get_environ(), lambda *args: str)
        streams.append(iter(t.cast("t.Any", body)))
        next(streams[0])

    contextvars.copy_context().run(begin)

    with app.test_request_context():
        scope = current_scope()

        with pytest.raises((AssertionError, ValueError)):
            t.cast("t.Any", streams[0]).close()

        assert current_scope() is scope is not None


@pytest.mark.skipif(MERGED, reason="The context is an argument from Flask 3.2 on.")
def test_teardown_after_the_request(make_app: AppFactory) -> None:
    """Whoever calls for it once more has what Flask has to say, and no more."""
    app = make_app()
    calls: list[object] = []
    app.teardown_request(calls.append)

    with app.test_request_context():
        late = contextvars.copy_context()

    late.run(app.do_teardown_request)
    assert calls == [None, None]


@pytest.mark.skipif(MERGED, reason="The context is an argument from Flask 3.2 on.")
def test_teardown_without_a_request(make_app: AppFactory) -> None:
    """It is Flask who says what is wrong."""
    app = make_app()

    with pytest.raises(RuntimeError, match="outside of request context"):
        app.do_teardown_request()


def test_nested_request_without_a_task(make_app: AppFactory) -> None:
    """A request that starts no task leaves those of the one around it (behaviour 6)."""
    app = make_late(make_app())
    done: list[str] = []

    @app.get("/inner")
    def inner() -> str:
        return "inner"

    @app.get("/outer")
    def outer() -> str:
        run(done.append, "outer")
        text = app.test_client().get("/inner").text
        assert done == []
        return text

    assert app.test_client().get("/outer").text == "inner"
    assert done == ["outer"]


def test_test_request_context(make_app: AppFactory) -> None:
    """run() works in a test_request_context, and is waited for (behaviour 3)."""
    app = make_late(make_app())
    done: list[str] = []

    with app.test_request_context():
        run(done.append, "task")
        assert done == []

    assert done == ["task"]


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
    """run() in a generator with context is never lost, nor refused (behaviour 4).

    Flask 3.1.3 tears the request down before the generator runs, and once more at its
    end; others do so only at the end.
    """
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/")
    def index() -> flask.Response:
        def generate() -> cabc.Iterator[str]:
            run(events.append, "first")
            yield "1"
            run(events.append, "second")
            yield "2"

        run(events.append, "view")
        return flask.Response(stream_with_context(generate()))

    response = app.test_client().get("/", buffered=False)
    body = iter(response.response)

    assert next(body) == b"1"

    if consume:
        assert list(body) == [b"2"]

    response.close()
    assert events == (["view", "first", "second"] if consume else ["view", "first"])


def test_generator_without_context(make_app: AppFactory) -> None:
    """run() in a plain generator, after the request, is a plain call (behaviour 4)."""
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/")
    def index() -> flask.Response:
        def generate() -> cabc.Iterator[str]:
            run(events.append, "generator")
            yield "1"

        return flask.Response(generate())

    response = app.test_client().get("/")

    assert response.text == "1"
    assert events == ["generator"]


# As it is, or from Flask 3.2 on in an exception group.
TEARDOWN_ERRORS = "another extension|Errors during context teardown"


def raise_in_teardown(app: Flask) -> None:
    """Have a function that is called in the teardown of a request raise."""

    @app.teardown_request
    def broken(exc: BaseException | None) -> None:
        raise LookupError("another extension")


def test_another_teardown_that_raises(make_app: AppFactory) -> None:
    """Another's teardown_request that raises: the tasks are awaited (behaviour 5)."""
    app = make_late(make_app())
    events: list[str] = []
    note_return(app, events)
    raise_in_teardown(app)

    @app.get("/")
    def index() -> str:
        run(events.append, "task")
        return "ok"

    with pytest.raises(Exception, match=TEARDOWN_ERRORS):
        app.test_client().get("/")

    assert events == ["task", "returned"]


def test_another_teardown_that_raises_in_an_app_context(make_app: AppFactory) -> None:
    """So they are where an app context is around the request (behaviour 5).

    Flask < 3.2 reuses it, and tears it down only at its own end.
    """
    app = make_late(make_app())
    events: list[str] = []
    raise_in_teardown(app)

    @app.get("/<name>")
    def index(name: str) -> str:
        assert current_scope() not in seen
        run(events.append, name)
        seen.append(current_scope())
        return "ok"

    seen: list[object] = []

    with app.app_context():
        for name in ("first", "second"):
            with pytest.raises(Exception, match=TEARDOWN_ERRORS):
                app.test_client().get(f"/{name}")

            assert events.pop() == name

        assert current_scope() is None


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_scope_that_is_opened_in_a_teardown(
    make_app: AppFactory, fails: bool, outer: bool
) -> None:
    """A scope that a teardown function opens is ended, though another raises.

    And the request context goes, without the garbage collector (behaviours 5 and 10).
    """
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

    gc.disable()

    try:
        with app.app_context() if outer else contextlib.nullcontext():
            with contextlib.suppress(Exception):
                app.test_client().get("/").close()

            assert events == ["task", "returned"]
            assert references[0]() is None
    finally:
        gc.enable()


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
    assert scopes[0] is not None
    assert scopes[0] is scopes[1]


def test_context_goes_with_its_last_reference(make_app: AppFactory) -> None:
    """No cycle runs through a request context whose scope has ended (behaviour 10)."""
    app = make_late(make_app())
    references: list[weakref.ref[t.Any]] = []

    @app.get("/")
    def index() -> str:
        run(int)
        references.append(weakref.ref(find_request_context()))
        return "ok"

    gc.disable()

    try:
        app.test_client().get("/").close()
        assert references[0]() is None
    finally:
        gc.enable()


def test_threads_that_open_the_scope_at_once(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two threads with the same contexts, both get the scope of the first."""
    app = make_late(make_app())
    events: list[str] = []
    scopes: list[object] = []
    keep = endings.keep

    def keep_late(request_context: object, *args: t.Any) -> TaskScope | None:
        monkeypatch.setattr(stack, "keep", keep)
        other = threading.Thread(target=contextvars.copy_context().run, args=[second])
        other.start()
        other.join(PATIENCE)
        return keep(request_context, *args)

    def second() -> None:
        run(events.append, "second")
        scopes.append(current_scope())

    monkeypatch.setattr(stack, "keep", keep_late)

    with app.test_request_context():
        run(events.append, "first")
        scopes.append(current_scope())

    assert scopes[0] is scopes[1]
    assert events == ["second", "first"]


@pytest.mark.parametrize("inner", ["same", "other", "mounted"])
def test_nested_request(make_app: AppFactory, inner: str) -> None:
    """A request in a view waits for its own tasks, and for no others (behaviour 6)."""
    outer_app = make_late(make_app())
    inner_app = outer_app if inner == "same" else make_late(make_app())
    site = DispatcherMiddleware(outer_app, {"/mounted": inner_app})
    client = Client(site if inner == "mounted" else inner_app)
    events: list[str] = []

    @outer_app.get("/outer")
    def outer() -> str:
        scope = current_scope()
        run(events.append, "outer task")
        path = "/mounted/inner" if inner == "mounted" else "/inner"
        assert client.get(path).status_code == 200
        events.append("inner returned")
        assert current_scope() is scope
        run(events.append, "another outer task")
        return "ok"

    @inner_app.get("/inner")
    def inside() -> str:
        run(events.append, "inner task")
        return "ok"

    assert Client(site).get("/outer").status_code == 200
    assert events == [
        "inner task",
        "inner returned",
        "outer task",
        "another outer task",
    ]


def test_nested_request_of_an_app_without_the_extension(make_app: AppFactory) -> None:
    """In a nested request of an app without ApiTask, run() is a call (behaviour 6)."""
    outer_app = make_late(make_app())
    inner_app = Flask(__name__)
    events: list[str] = []

    @outer_app.get("/")
    def outer() -> str:
        scope = current_scope()
        run(events.append, "outer task")
        inner_app.test_client().get("/")
        assert current_scope() is scope
        return "ok"

    @inner_app.get("/")
    def inside() -> str:
        assert current_scope() is None
        run(events.append, "inner task")
        return "ok"

    assert outer_app.test_client().get("/").status_code == 200
    assert events == ["inner task", "outer task"]


def test_app_context_of_another_app_in_a_request(make_app: AppFactory) -> None:
    """In another app's context, the request's scope is out of sight (behaviour 6)."""
    app = make_late(make_app())
    other = make_app()

    with app.test_request_context():
        scope = current_scope()

        with other.app_context():
            assert current_scope() is None
            assert run(threading.get_ident).result(0) == threading.get_ident()

        assert current_scope() is scope


def test_app_context_of_the_app_in_a_request(make_app: AppFactory) -> None:
    """It makes no difference, but that no request is in it from Flask 3.2 on."""
    app = make_late(make_app())
    events: list[str] = []

    with app.test_request_context():
        scope = current_scope()

        with app.app_context():
            assert current_scope() is (None if MERGED else scope)
            run(events.append, "task")

        assert events == (["task"] if MERGED else [])

    assert events == ["task"]


@pytest.mark.parametrize("same", [True, False])
def test_request_inside_a_task(make_app: AppFactory, same: bool) -> None:
    """A request made by a task has a scope of its own, and waits (behaviour 6)."""
    app = make_app()
    inner_app = app if same else make_app()
    events: list[str] = []
    threads: list[int] = []

    def call() -> None:
        threads.append(threading.get_ident())
        assert inner_app.test_client().get("/inner").status_code == 200
        events.append("inner returned")
        assert current_scope() is None

    @app.get("/outer")
    def outer() -> str:
        run(call).result(PATIENCE)
        return "ok"

    ending = threading.Event()

    def work() -> None:
        threads.append(threading.get_ident())
        assert ending.wait(PATIENCE)
        events.append("inner task")

    @inner_app.get("/inner")
    def inside() -> str:
        run(work)
        return "ok"

    inner_app.teardown_request(lambda exc: ending.set())

    assert app.test_client().get("/outer").status_code == 200
    assert events == ["inner task", "inner returned"]
    assert len(threads) == 2


@pytest.mark.parametrize("where", ["thread", "same thread", "copied variables"])
def test_copied_request_context(make_app: AppFactory, where: str) -> None:
    """A copied request context has nothing of the request's scope (behaviour 7)."""
    app = make_late(make_app())
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
        else:
            variables = contextvars.copy_context()
            call = variables.run if where == "copied variables" else _call
            thread = threading.Thread(target=call, args=[copied], daemon=True)
            thread.start()
            thread.join(PATIENCE)
            assert not thread.is_alive()

        assert current_scope() is scope
        assert not t.cast("t.Any", scope).closed
        run(events.append, "view again")
        return "ok"

    response = in_time(app.test_client().get, "/")

    assert response.status_code == 200
    assert events == ["end of copy", "copied", "view", "view again"]


def _call(fn: cabc.Callable[[], None]) -> None:
    fn()


def test_copied_context_variables_alone(make_app: AppFactory) -> None:
    """With a request's context variables, a thread is in it (behaviour 7)."""
    app = make_late(make_app())
    events: list[str] = []
    note_return(app, events)

    @app.get("/")
    def index() -> str:
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=context.run, args=[run, events.append, "task"], daemon=True
        )
        thread.start()
        thread.join(PATIENCE)
        return "ok"

    in_time(app.test_client().get, "/")
    assert events == ["task", "returned"]


def test_copied_context_that_outlives_the_request(make_app: AppFactory) -> None:
    """A copied context in use after the request still has run() (behaviour 7)."""
    app = make_late(make_app())
    events: list[str] = []
    returned = threading.Event()
    threads: list[threading.Thread] = []

    @app.get("/")
    def index() -> str:
        @copy_current_request_context
        def copied() -> None:
            assert returned.wait(PATIENCE)
            run(events.append, "copied")

        run(events.append, "view")
        threads.append(threading.Thread(target=copied, daemon=True))
        threads[0].start()
        return "ok"

    in_time(app.test_client().get, "/")
    assert events == ["view"]
    returned.set()
    threads[0].join(PATIENCE)
    assert events == ["view", "copied"]


def test_context_variables_that_outlive_the_request(make_app: AppFactory) -> None:
    """Once the request is over, run() is a plain call in them (behaviour 7)."""
    app = make_app()
    threads: list[int] = []

    with app.test_request_context():
        run(int)
        context = contextvars.copy_context()

    assert context.run(current_scope) is None
    context.run(run, lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


@pytest.mark.skipif(MERGED, reason="A context is over for good from Flask 3.2 on.")
def test_late_thread_leaves_a_context_that_is_pushed_anew(
    make_app: AppFactory,
) -> None:
    """A plain call after the request does not keep it from a scope later on."""
    app = make_late(make_app())
    request_context = app.test_request_context()

    with request_context:
        late = contextvars.copy_context()

    late.run(run, int)

    with request_context:
        assert current_scope() is not None


@pytest.mark.skipif(MERGED, reason="A context is over for good from Flask 3.2 on.")
def test_late_threads_leave_the_scope_of_a_context_that_is_pushed_anew(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forgets its own scope, but none that was opened since."""
    app = make_late(make_app())
    request_context = app.test_request_context()

    threads = app.extensions["apitask"].threads

    with request_context:
        late = contextvars.copy_context()

    anew = contextvars.copy_context()
    scopes: list[object] = []

    def push_after(ending: object) -> bool:
        over = is_over(ending)
        monkeypatch.undo()
        # A second one, that found no scope either.
        scope = TaskScope(threads, max_workers=1)
        assert endings.keep(request_context, scope, threads.process) is None
        anew.run(request_context.push)
        scopes.append(anew.run(current_scope))
        return over

    monkeypatch.setattr(endings, "is_over", push_after)
    late.run(run, int)
    assert anew.run(current_scope) is scopes[0]
    anew.run(request_context.pop)


def test_late_thread_that_finds_the_scope_of_another(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has submitted until the other one looks is waited for."""
    app = make_late(make_app())
    events: list[str] = []

    with app.test_request_context():
        late, later = contextvars.copy_context(), contextvars.copy_context()

    def submit_after(ending: object) -> bool:
        monkeypatch.undo()
        later.run(run, events.append, "task")
        assert events == []
        return is_over(ending)

    monkeypatch.setattr(endings, "is_over", submit_after)
    late.run(run, int)
    assert events == ["task"]


def test_thread_that_opens_a_scope_while_the_request_ends(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has opened until the request is marked as over, is waited for."""
    app = make_late(make_app())
    events: list[str] = []

    def mark_late(ending: object) -> None:
        monkeypatch.undo()
        run(events.append, "task")
        assert events == []
        mark_over(ending)

    monkeypatch.setattr(endings, "mark_over", mark_late)

    with app.test_request_context():
        pass

    assert events == ["task"]


def test_request_that_ends_while_its_scope_is_opened(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then run() is a plain call, as nobody would end the scope (behaviour 7)."""
    app = make_app()
    threads: list[int] = []
    request_context = app.test_request_context()
    request_context.push()

    def end_after(ending: object) -> bool:
        over = is_over(ending)
        monkeypatch.undo()
        request_context.pop()
        return over

    monkeypatch.setattr(endings, "is_over", end_after)
    run(lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


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


def test_worker_does_not_end_the_scope_it_works_for(make_app: AppFactory) -> None:
    """The end of a task's app context ends no scope (behaviour 7)."""
    app = make_app(APITASK_MAX_WORKERS=1)
    seen: list[bool] = []

    @app.get("/")
    def index() -> str:
        scope = current_scope()
        assert scope is not None

        for _ in range(3):
            run(str).result(PATIENCE)
            wait()
            seen.append(scope.closed)

        assert current_scope() is scope
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert seen == [False, False, False]


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
@pytest.mark.parametrize("threads", [False, True])
def test_no_reference_to_an_argument_is_left(
    make_app: AppFactory,
    monkeypatch: pytest.MonkeyPatch,
    without_gc: None,
    fails: bool,
    threads: bool,
) -> None:
    """After the request, nothing refers to a task's arguments (behaviour 8)."""
    app = make_app() if threads else make_late(make_app())
    # The records hold the exception, and pytest holds the records.
    monkeypatch.setattr(app.logger, "disabled", True)
    references: list[weakref.ref[Argument]] = []

    def work(argument: Argument, fails: bool) -> Argument:
        if fails:
            raise ValueError(argument)

        return argument

    @app.get("/")
    def index() -> str:
        argument = Argument()
        references.append(weakref.ref(argument))
        run(work, argument, fails)
        return "ok"

    client = app.test_client()
    client.get("/")
    client.get("/")

    assert [reference() for reference in references] == [None, None]


def test_two_apps_have_two_pools(make_app: AppFactory) -> None:
    """A full pool of one app keeps no task of another from running (behaviour 9)."""
    apps = [make_app(APITASK_POOL_SIZE=1, APITASK_MAX_WORKERS=n) for n in (1, 2)]
    started = threading.Event()
    scopes: list[str] = []

    with apps[0].test_request_context():
        blocked = run(started.wait, PATIENCE)
        scopes.append(repr(current_scope()))

        with apps[1].test_request_context():
            # Nobody helps here: only a thread of a second pool can do it.
            run(started.set).result(PATIENCE)
            scopes.append(repr(current_scope()))

        assert blocked.result(PATIENCE) is True

    assert [text[-14:] for text in scopes] == ["max_workers=1>", "max_workers=2>"]


def test_one_worker_is_one_at_a_time(make_app: AppFactory) -> None:
    """With max_workers=1 tasks run in order, whoever runs them (behaviour 10)."""
    app = make_app(APITASK_MAX_WORKERS=1)
    events: list[int] = []
    overlaps: list[int] = []
    busy = threading.Lock()
    helping = threading.Event()

    def work(number: int) -> None:
        if not busy.acquire(blocking=False):
            overlaps.append(number)
            return

        if number == 0:
            assert helping.wait(PATIENCE)

        events.append(number)
        busy.release()

    @app.get("/")
    def index() -> str:
        for number in range(50):
            run(work, number)

        return "ok"

    app.teardown_request(lambda exc: helping.set())
    app.test_client().get("/")

    assert overlaps == []
    assert events == list(range(50))


def test_app_goes_though_a_variable_refers_to_the_request(without_gc: None) -> None:
    """One that has an error, say, in variables of the request (behaviour 10)."""
    variable: contextvars.ContextVar[object] = contextvars.ContextVar("variable")
    app = Flask(__name__)
    ApiTask(app)

    def index() -> str:
        variable.set(find_request_context())
        return "ok"

    app.add_url_rule("/", "index", index)
    contextvars.copy_context().run(app.test_client().get, "/")
    reference = weakref.ref(app)
    del app
    assert reference() is None


def test_app_goes_with_its_last_reference(
    monkeypatch: pytest.MonkeyPatch, without_gc: None
) -> None:
    """An app is freed without the garbage collector's help (behaviour 10)."""
    gone = threading.Event()
    app = Flask(__name__)
    ApiTask(app)
    monkeypatch.setattr(app.logger, "disabled", True)

    # Not by a decorator: app.get() would keep the app in a cell of this very frame.
    def index() -> str:
        run(str)
        run(divmod, 1, 0)
        assert isinstance(run(divmod, 1, 0).exception(PATIENCE), ZeroDivisionError)
        return "ok"

    app.add_url_rule("/", "index", index)

    for _ in range(2):
        assert app.test_client().get("/").status_code == 200

    # A thread that goes home may be the last to let go of it.
    reference = weakref.ref(app, lambda _: gone.set())
    del app

    assert gone.wait(PATIENCE)
    assert reference() is None


@pytest.fixture
def without_gc() -> cabc.Iterator[None]:
    """What is freed is freed by the count of its references."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_concurrent_requests_share_the_pool(make_app: AppFactory) -> None:
    """Requests on a threaded server share the cap of the process (behaviour 10)."""
    app = make_app(APITASK_POOL_SIZE=2, APITASK_MAX_WORKERS=4)
    # Two threads of the pool, and the two that help.
    arrived = threading.Semaphore(0)
    release = threading.Event()
    names: list[str] = []
    counting = threading.Lock()
    submitted = threading.Barrier(2, timeout=PATIENCE)
    running = 0
    most = 0

    def work() -> None:
        nonlocal running, most

        with counting:
            running += 1
            most = max(most, running)
            names.append(threading.current_thread().name)

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

    statuses: list[int] = []

    def request(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/")
        statuses.append(connection.getresponse().status)
        connection.close()

    with make_server("127.0.0.1", 0, app, threaded=True) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        clients = [
            threading.Thread(target=request, args=[server.server_port])
            for _ in range(2)
        ]

        try:
            for client in clients:
                client.start()

            for _ in range(4):
                assert arrived.acquire(timeout=PATIENCE)
        finally:
            release.set()

            for client in clients:
                client.join(PATIENCE)

            server.shutdown()
            serving.join(PATIENCE)

    assert statuses == [200, 200]
    assert most == 4
    assert len(names) == 8
    assert len({name for name in names if name.startswith("apitask")}) == 2
