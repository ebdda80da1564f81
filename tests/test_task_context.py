from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
import time
import typing as t

import pytest
from conftest import PATIENCE
from flask import current_app
from flask import Flask
from flask import g
from flask import has_request_context
from flask import render_template_string
from flask import request
from flask import session
from flask import url_for
from late_threads import in_time
from late_threads import make_late

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import task
from flask_apitask import task_finished
from flask_apitask import task_started
from flask_apitask import wait

if t.TYPE_CHECKING:
    import collections.abc as cabc
    from concurrent.futures import Future

    from conftest import AppFactory

color: contextvars.ContextVar[str] = contextvars.ContextVar("color", default="none")


class Signals:
    """What the receivers of both signals were sent, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, t.Any]]] = []

    def started(self, sender: Flask, **fields: t.Any) -> None:
        self.sent.append(("started", {"sender": sender, **fields}))

    def finished(self, sender: Flask, **fields: t.Any) -> None:
        self.sent.append(("finished", {"sender": sender, **fields}))


@pytest.fixture
def signals() -> cabc.Iterator[Signals]:
    """Return what is sent in a test."""
    signals = Signals()

    with (
        task_started.connected_to(signals.started),
        task_finished.connected_to(signals.finished),
    ):
        yield signals

    signals.sent.clear()


def test_task_has_a_g_of_its_own(make_app: AppFactory) -> None:
    """In a task g is empty, and what it sets there is its own (behaviour 12)."""
    app = make_app()

    def work() -> list[str]:
        found = list(g)
        g.task = "task"
        return found

    with app.test_request_context():
        g.request = "request"
        assert run(work).result(PATIENCE) == []
        assert run(work).result(PATIENCE) == []
        assert "task" not in g
        assert g.request == "request"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fails", [True, False])
def test_teardown_functions_of_a_task(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    late: bool,
    fails: bool,
) -> None:
    """A task's end calls teardown_appcontext, not teardown_request (behaviour 12)."""
    app = make_late(make_app()) if late else make_app()
    events: list[t.Any] = []

    @app.teardown_appcontext
    def close(exc: BaseException | None) -> None:
        events.append(("appcontext", g.get("who"), type(exc)))

    @app.teardown_request
    def finish(exc: BaseException | None) -> None:
        events.append("request")

    def work() -> None:
        g.who = "task"
        events.append("task")

        if fails:
            raise ValueError

    @app.get("/")
    def index() -> str:
        g.who = "request"
        run(work)
        wait()
        events.append("view")
        return "ok"

    app.test_client().get("/")

    assert events == [
        "task",
        ("appcontext", "task", ValueError if fails else type(None)),
        "view",
        "request",
        ("appcontext", "request", type(None)),
    ]


def test_teardown_function_that_fails(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A teardown function that raises at a task's end is contained (behaviour 11)."""
    app = make_app()

    @app.teardown_appcontext
    def close(exc: BaseException | None) -> None:
        if g.get("who") == "task":
            raise LookupError("teardown")

    def work() -> None:
        g.who = "task"

    with app.test_request_context():
        error = run(work).exception(PATIENCE)

    # From Flask 3.2 on it is in an exception group, or two.
    while isinstance(nested := getattr(error, "exceptions", None), tuple):
        (error,) = nested

    assert isinstance(error, LookupError)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("waits", ["teardown", "close"])
def test_flask_works_in_a_task(make_app: AppFactory, waits: str) -> None:
    """current_app, request, session, url_for and templates do (behaviour 13).

    Also after the request's own end.
    """
    app = make_late(make_app(APITASK_WAIT=waits, SECRET_KEY="secret"))
    futures: list[Future[t.Any]] = []

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
            "template": render_template_string("{{ request.path }} {{ session.user }}"),
        }

    @app.post("/path/<name>")
    def index(name: str) -> str:
        g.who = "request"
        session["user"] = "ann"
        assert request.json == {"number": 7}
        futures.append(run(work))
        return "ok"

    client = app.test_client()
    client.post("/path/x?q=1", json={"number": 7}, headers={"X-Id": "9"}, buffered=True)
    assert futures[0].result(0) == {
        "app": app,
        "g": [],
        "request": ("POST", "/path/x", {"name": "x"}),
        "endpoint": "index",
        "args": "1",
        "headers": "9",
        "json": {"number": 7},
        "session": {"user": "ann"},
        "url": "http://localhost/path/y",
        "template": "/path/x ann",
    }


def test_task_of_a_command_has_no_request(make_app: AppFactory) -> None:
    """A task of a block outside of any request has the app, and no request."""
    app = make_app()

    def work() -> tuple[str, bool]:
        return current_app.name, has_request_context()

    with app.app_context(), open_scope():
        assert run(work).result(PATIENCE) == (app.name, False)


@pytest.mark.parametrize("late", [False, True])
def test_context_variables(make_app: AppFactory, late: bool) -> None:
    """A task has the variables as they were at run(); its own stay (behaviour 13)."""
    app = make_late(make_app()) if late else make_app()

    def work() -> str:
        found = color.get()
        color.set("the task's")
        return found

    @app.get("/")
    def index() -> str:
        color.set("red")
        red = run(work)
        color.set("blue")
        blue = run(work)
        wait()
        assert color.get() == "blue"
        assert [red.result(0), blue.result(0)] == ["red", "blue"]
        return "ok"

    in_own_context = contextvars.copy_context()
    client = app.test_client()

    assert in_own_context.run(client.get, "/").status_code == 200
    assert color.get() == "none"


def test_two_tasks_never_share_a_context(make_app: AppFactory) -> None:
    """Two tasks of a request at once each have their own contexts (behaviour 13)."""
    app = make_app()
    both = threading.Barrier(2, timeout=PATIENCE)

    def work(name: str) -> tuple[str, str, str]:
        both.wait()
        color.set(name)
        g.name = name
        path = request.path
        both.wait()
        return color.get(), g.name, path

    @app.get("/index")
    def index() -> str:
        for _ in range(500):
            first = run(work, "first")
            second = run(work, "second")
            assert first.result(PATIENCE) == ("first", "first", "/index")
            assert second.result(PATIENCE) == ("second", "second", "/index")

        return "ok"

    assert app.test_client().get("/index").status_code == 200


def test_run_in_a_task_is_a_plain_call(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """In a task run() is a plain call, and raises to its caller (behaviour 14)."""
    app = make_app(APITASK_MAX_WORKERS=1, APITASK_POOL_SIZE=1)

    def work() -> None:
        assert current_scope() is None
        g.who = "task"
        assert run(g.get, "who").result(0) == "task"
        assert run(threading.get_ident).result(0) == threading.get_ident()
        wait()

        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0)

    @app.get("/")
    def index() -> str:
        assert run(work).exception(PATIENCE) is None
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert caplog.records == []


@pytest.mark.parametrize("late", [False, True])
def test_done_callback_finds_what_a_task_does(make_app: AppFactory, late: bool) -> None:
    """A context of its own, the request and the variables of the task (case 27)."""
    app = make_late(make_app()) if late else make_app()
    found: list[object] = []

    def note(future: Future[int]) -> None:
        found.append((current_app.name, request.path, list(g), color.get()))
        found.append(current_scope())
        found.append(run(threading.get_ident).result(0) == threading.get_ident())
        g.who = "callback"
        color.set("the callback's")

    @app.get("/path")
    def index() -> str:
        color.set("red")
        g.who = "request"
        future = run(int)
        color.set("blue")
        future.add_done_callback(note)
        future.result(PATIENCE)
        wait()
        future.add_done_callback(note)
        return f"{g.who} {color.get()}"

    response = contextvars.copy_context().run(app.test_client().get, "/path")
    assert response.text == "request blue"
    assert found == [(app.name, "/path", [], "red"), None, True] * 2


def test_open_scope_in_a_task(make_app: AppFactory) -> None:
    """A task may open a scope: no cap makes it wait for ever (behaviour 14)."""
    app = make_app(APITASK_MAX_WORKERS=1, APITASK_POOL_SIZE=1)
    done: list[str] = []

    def work() -> None:
        with open_scope(max_workers=1) as scope:
            assert current_scope() is scope
            run(done.append, "first")
            run(done.append, "second")

        assert current_scope() is None
        done.append("task")

    @app.get("/")
    def index() -> str:
        for _ in range(3):
            run(work)

        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert done == ["first", "second", "task"] * 3


@pytest.mark.parametrize("in_request", [True, False])
def test_async_task_runs_through_ensure_sync(in_request: bool) -> None:
    """An async def task runs through the app's ensure_sync (behaviour 15)."""
    used: list[object] = []

    class OwnFlask(Flask):
        def ensure_sync(self, func: cabc.Callable[..., t.Any]) -> t.Any:
            if inspect.iscoroutinefunction(func):
                used.append(func)

            return super().ensure_sync(func)

    app = OwnFlask(__name__)
    ApiTask(app)

    async def work(number: int) -> tuple[int, str, str]:
        await asyncio.sleep(0)
        return number, current_app.name, color.get()

    with app.test_request_context() if in_request else app.app_context():
        assert run(work, 7).result(PATIENCE) == (7, app.name, "none")

    assert len(used) == 1


class AsyncCallable:
    """An object whose call gives a coroutine."""

    async def __call__(self) -> str:
        return "called"


class AsyncTask:
    """A Task whose run() is async."""

    name = "async"

    async def run(self) -> str:
        return "run"


@pytest.mark.parametrize("in_request", [True, False])
def test_whatever_gives_a_coroutine_is_awaited(
    make_app: AppFactory, in_request: bool
) -> None:
    """Callables that turn out to be async are run to their end (behaviour 15)."""
    app = make_app()

    async def plain(word: str) -> str:
        return word

    tasks: list[t.Any] = [AsyncCallable(), AsyncTask(), lambda: plain("lambda")]

    if in_request:
        with app.test_request_context():
            results = [run(work).result(PATIENCE) for work in tasks]
    else:
        results = [run(work).result(PATIENCE) for work in tasks]

    assert results == ["called", "run", "lambda"]


def test_async_task_that_fails(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """An async task that raises is contained like any other (behaviour 15)."""
    app = make_app()
    error = ValueError()

    async def work() -> None:
        await asyncio.sleep(0)
        raise error

    with app.test_request_context():
        assert run(work).exception(PATIENCE) is error

    assert len(caplog.records) == 1


def test_coroutine_that_can_not_be_awaited(
    make_app: AppFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without Flask's async extra a task fails, and nothing is left (behaviour 15).

    A coroutine that is never awaited would warn, and a warning is an error here.
    """
    app = make_app()

    def refuse(fn: cabc.Callable[..., t.Any]) -> t.Any:
        raise RuntimeError("Install Flask with the 'async' extra")

    async def work() -> None:
        raise AssertionError

    with app.test_request_context():
        monkeypatch.setattr(app, "async_to_sync", refuse)
        error = run(work).exception(PATIENCE)
        monkeypatch.undo()

    assert isinstance(error, RuntimeError)
    assert len(caplog.records) == 1


def test_async_view(make_app: AppFactory) -> None:
    """An async view, and what it starts on its loop, has the request's scope."""
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/")
    async def index() -> str:
        scope = current_scope()
        assert scope is not None
        run(events.append, "view")

        async def child() -> None:
            assert current_scope() is scope
            run(events.append, "child")

        await asyncio.create_task(child())
        await asyncio.gather(child(), child())
        assert events == []
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert events == ["view", "child", "child", "child"]


def test_child_is_the_first_to_run_a_task(make_app: AppFactory) -> None:
    """A scope that a child of an async view's loop opens is the request's."""
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/")
    async def index() -> str:
        async def child() -> None:
            run(events.append, "child")

        await asyncio.create_task(child())
        run(events.append, "view")
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert events == ["child", "view"]


def test_async_task_in_an_async_view(make_app: AppFactory) -> None:
    """An async task of an async view has an event loop of its own (behaviour 15).

    The wait may be on the thread of a loop that runs.
    """
    app = make_late(make_app())
    futures = []

    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    @app.get("/")
    async def index() -> str:
        futures.append(run(work))
        wait()
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert futures[0].result(0) == "done"


def test_async_plain_call_in_an_async_task(make_app: AppFactory) -> None:
    """run() of an async def in an async def task is a plain call (behaviour 14)."""
    app = make_app()

    async def inner() -> str:
        await asyncio.sleep(0)
        return "inner"

    async def work() -> str:
        return run(inner).result(0)

    with app.test_request_context():
        assert run(work).result(PATIENCE) == "inner"


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the system refuse to start a thread."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_no_thread_can_be_started(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch, signals: Signals
) -> None:
    """Without threads, tasks run where they are submitted (behaviour 16)."""
    app = make_app(APITASK_MAX_WORKERS=2)
    events: list[str] = []

    @app.get("/")
    def index() -> str:
        run(events.append, "first")
        failing = run(divmod, 1, 0)
        assert isinstance(failing.exception(0), ZeroDivisionError)
        run(events.append, "second")
        events.append("view")
        return "ok"

    refuse_threads(monkeypatch)
    response = app.test_client().get("/")
    monkeypatch.undo()

    assert response.status_code == 200
    assert events == ["first", "second", "view"]
    assert {fields["how"] for _, fields in signals.sent} == {"inline"}


def test_threads_come_back(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When threads can be started again, tasks run on them again (behaviour 16)."""
    app = make_app()

    with app.test_request_context():
        refuse_threads(monkeypatch)
        assert run(threading.get_ident).result(0) == threading.get_ident()
        monkeypatch.undo()
        assert run(threading.get_ident).result(PATIENCE) != threading.get_ident()


@pytest.mark.parametrize("how", ["thread", "inline"])
def test_signals(make_app: AppFactory, signals: Signals, how: str) -> None:
    """Both signals are sent around a task, with times in order."""
    app = make_app()

    @task("mailer.welcome")
    def work(number: int, *, user: int) -> int:
        return threading.get_ident()

    before = time.monotonic()

    with app.test_request_context() if how == "thread" else app.app_context():
        thread = run(work, 1, user=2).result(PATIENCE)

    after = time.monotonic()
    (first, started), (second, finished) = signals.sent

    assert (first, second) == ("started", "finished")
    assert (thread == threading.get_ident()) is (how != "thread")
    times = {"submitted", "started"}
    assert started.keys() == {"sender", "name", "how", "args", "kwargs"} | times
    assert started["args"] == (1,)
    assert started["kwargs"] == {"user": 2}
    assert finished == {
        **started,
        "finished": finished["finished"],
        "exception": None,
        "result": thread,
    }
    assert started["sender"] is app
    assert started["name"] == "mailer.welcome"
    assert started["how"] == how
    order = [started["submitted"], started["started"], finished["finished"]]
    assert [before, *order, after] == sorted([before, *order, after])


def test_signals_of_a_failing_task(
    make_app: AppFactory, signals: Signals, caplog: pytest.LogCaptureFixture
) -> None:
    """task_finished tells what was raised, of a plain call as well."""
    app = make_app()

    with app.test_request_context():
        error = run(divmod, 1, 0).exception(PATIENCE)

    with app.app_context(), pytest.raises(ZeroDivisionError) as excinfo:
        run(divmod, 1, 0)

    assert [fields.get("exception") for _, fields in signals.sent] == [
        None,
        error,
        None,
        excinfo.value,
    ]
    assert error is not None


def test_receivers_are_in_the_task(make_app: AppFactory) -> None:
    """Receivers run in the task's thread and contexts, and may be async."""
    app = make_app()
    seen: list[t.Any] = []

    async def started(sender: Flask, **fields: t.Any) -> None:
        g.span = "span"
        seen.append(request.path)

    def finished(sender: Flask, **fields: t.Any) -> None:
        seen.extend([g.span, threading.get_ident()])

    with (
        task_started.connected_to(started),
        task_finished.connected_to(finished),
        app.test_request_context("/path"),
    ):
        thread = run(threading.get_ident).result(PATIENCE)

    assert seen == ["/path", "span", thread]


def test_plain_call_without_an_app_sends_no_signal(signals: Signals) -> None:
    """There is no sender outside of any app context, so there is no signal."""
    run(str)
    assert signals.sent == []


@pytest.mark.parametrize("observed", [False, True])
def test_async_done_callback(make_app: AppFactory, observed: bool) -> None:
    """A done callback may be async, as a task may: it is run to its end."""
    app = make_app()
    done: list[str] = []

    async def work() -> str:
        await asyncio.sleep(0)
        return "task"

    async def note(future: Future[str]) -> None:
        await asyncio.sleep(0)
        done.append(future.result(0) + request.path)

    receivers = task_started.connected_to(lambda app, **fields: None)

    with receivers if observed else contextlib.nullcontext():
        with app.test_request_context("/page"):
            run(work).add_done_callback(t.cast("t.Any", note))

    assert done == ["task/page"]
