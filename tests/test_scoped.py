from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import math
import threading
import typing as t

import flask
import pytest
from conftest import PATIENCE
from flask import Flask
from flask import request
from late_threads import in_time
from late_threads import make_late

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import ScopeClosed
from flask_apitask import scoped
from flask_apitask import TaskScope
from flask_apitask import wait

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("limits", [False, True])
def test_scoped_view(make_app: AppFactory, enabled: bool, limits: bool) -> None:
    """The tasks of a decorated view are done when it returns."""
    app = make_late(make_app(APITASK_ENABLED=enabled))
    events: list[str] = []

    def index() -> str:
        """Answer."""
        run(events.append, "task")
        events.append("view")
        return repr(current_scope())

    view = scoped(max_workers=3)(index) if limits else scoped(index)

    @app.get("/")
    def outer() -> str:
        text = view()
        events.append("returned")
        return text

    response = app.test_client().get("/")

    assert events == ["view", "task", "returned"]
    assert f"max_workers={3 if limits else 8}>" in response.text
    assert (view.__name__, view.__doc__) == ("index", "Answer.")


def test_scoped_view_that_raises(make_app: AppFactory) -> None:
    """The tasks of a decorated view are done when it raises, too."""
    app = make_late(make_app())
    done: list[str] = []

    @scoped
    def view() -> None:
        run(done.append, "task")
        raise ZeroDivisionError

    with app.test_request_context():
        with pytest.raises(ZeroDivisionError):
            view()

        assert done == ["task"]


def test_scoped_keeps_arguments(make_app: AppFactory) -> None:
    """A decorated function takes the arguments that it took before."""
    app = make_app()

    @scoped(timeout=PATIENCE)
    def view(*args: object, **kwargs: object) -> object:
        return args, kwargs

    with app.app_context():
        result = view(1, view=2, max_workers=3, timeout=4)

    assert result == ((1,), {"view": 2, "max_workers": 3, "timeout": 4})


@pytest.mark.parametrize("fails", [True, False])
def test_scoped_async_view(make_app: AppFactory, fails: bool) -> None:
    """The tasks of an async view are done when it returns, or raises."""
    app = make_late(make_app(APITASK_ENABLED=False))
    events: list[str] = []

    @scoped
    async def view() -> str:
        run(events.append, "task")
        await asyncio.sleep(0)
        run(events.append, "another")
        events.append("view")

        if fails:
            raise ZeroDivisionError

        return "ok"

    @app.get("/")
    async def index() -> str:
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            assert await view() == "ok"

        events.append("returned")
        assert current_scope() is None
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert events == ["view", "task", "another", "returned"]


def test_end_of_an_async_view_leaves_its_loop_running(make_app: AppFactory) -> None:
    """A task may need the view's event loop while the view's end waits for it."""
    app = make_app()

    async def on_the_loop() -> str:
        return "from the loop"

    def ask(loop: asyncio.AbstractEventLoop) -> str:
        future = asyncio.run_coroutine_threadsafe(on_the_loop(), loop)
        return future.result(PATIENCE)

    futures: list[concurrent.futures.Future[str]] = []

    @app.get("/")
    @scoped
    async def index() -> str:
        futures.append(run(ask, asyncio.get_running_loop()))
        return "ok"

    assert in_time(app.test_client().get, "/").status_code == 200
    assert futures[0].result(0) == "from the loop"


@pytest.mark.parametrize("limit", [{"max_workers": 0}, {"timeout": -1.0}])
def test_limits_are_checked(make_app: AppFactory, limit: dict[str, t.Any]) -> None:
    """A limit that is not positive is a ValueError, of a decorator at once."""
    (name,) = limit
    app = make_app()

    with pytest.raises(ValueError, match=f"^{name} is "):
        scoped(**limit)

    with app.app_context(), pytest.raises(ValueError, match=f"^{name} is "):
        open_scope(**limit).__enter__()


@pytest.mark.parametrize("view", [3, "view"])
def test_scoped_takes_a_function(view: t.Any) -> None:
    """Anything else is a TypeError that shows how limits are given."""
    with pytest.raises(TypeError, match=r"as in @scoped\(max_workers=2\), not ['3]"):
        scoped(view)


def test_limits_default_to_the_config(make_app: AppFactory) -> None:
    """A block has the app's limits, unless it has its own."""
    app = make_app(APITASK_MAX_WORKERS=3, APITASK_TIMEOUT=PATIENCE)

    with app.app_context():
        with open_scope() as scope:
            assert "max_workers=3>" in repr(scope)
            assert scope._timeout == PATIENCE

        with open_scope(max_workers=2, timeout=math.inf) as scope:
            assert "max_workers=2>" in repr(scope)
            assert scope._timeout is None


def test_open_scope_without_an_app_context() -> None:
    """Outside of any app context open_scope says what is missing."""
    with pytest.raises(RuntimeError, match="Working outside of application context"):
        open_scope().__enter__()


def test_open_scope_without_the_extension() -> None:
    """On an app that has no ApiTask open_scope says how to get one."""
    app = Flask("site")

    with app.app_context(), pytest.raises(RuntimeError) as excinfo:
        open_scope().__enter__()

    assert str(excinfo.value) == (
        "There is no 'ApiTask' on the current Flask app 'site'. Create one"
        " with ApiTask(app), or call its init_app(app)."
    )


def test_command(make_app: AppFactory) -> None:
    """A block in a CLI command waits for its tasks."""
    app = make_late(make_app())
    events: list[str] = []

    @app.cli.command("work")
    def work() -> None:
        assert current_scope() is None

        with open_scope() as scope:
            assert current_scope() is scope
            run(events.append, "task")
            events.append("block")

        events.append("command")

    result = app.test_cli_runner().invoke(args=["work"], catch_exceptions=False)

    assert result.exit_code == 0
    assert events == ["block", "task", "command"]


def test_block_that_raises(make_app: AppFactory) -> None:
    """The tasks of a block are done when it is left by an exception."""
    app = make_late(make_app())
    done: list[str] = []

    with app.app_context():
        with contextlib.suppress(ZeroDivisionError), open_scope():
            run(done.append, "task")
            raise ZeroDivisionError

        assert done == ["task"]
        assert current_scope() is None


@pytest.mark.parametrize("in_request", [True, False])
def test_scopes_nest(make_app: AppFactory, in_request: bool) -> None:
    """A task belongs to the innermost scope, and each waits for its own only."""
    app = make_late(make_app())
    events: list[str] = []
    outermost = app.test_request_context() if in_request else app.app_context()

    with outermost:
        before = current_scope()
        assert (before is not None) is in_request

        with open_scope() as outer:
            run(events.append, "outer")

            with open_scope() as inner:
                assert current_scope() is inner
                run(events.append, "inner")

            assert events == ["inner"]
            assert current_scope() is outer
            run(events.append, "outer again")

        assert events == ["inner", "outer", "outer again"]
        assert current_scope() is before


def test_block_in_a_view_ends_before_the_request(make_app: AppFactory) -> None:
    """The end of a block in a view leaves the request's scope alone."""
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/")
    def index() -> str:
        run(events.append, "request")

        with open_scope():
            run(events.append, "block")

        events.append("view")
        run(events.append, "request again")
        return "ok"

    assert app.test_client().get("/").status_code == 200
    assert events == ["block", "view", "request", "request again"]


def test_request_inside_a_block(make_app: AppFactory) -> None:
    """A request made in a block has its own scope, not the block's (behaviour 6)."""
    app = make_late(make_app())
    events: list[str] = []

    @app.get("/")
    def index() -> str:
        assert current_scope() is not scope
        run(events.append, "request")
        return "ok"

    with app.app_context(), open_scope() as scope:
        run(events.append, "block")
        assert app.test_client().get("/").status_code == 200
        assert events == ["request"]
        assert current_scope() is scope

    assert events == ["request", "block"]


def test_block_of_another_app_is_out_of_sight(make_app: AppFactory) -> None:
    """In the context of another app, a block's scope is not used (behaviour 9)."""
    app, other = make_late(make_app()), make_late(make_app())

    with app.app_context(), open_scope() as scope:
        with other.app_context():
            assert current_scope() is None

            with open_scope() as inner:
                with app.app_context():
                    assert current_scope() is scope

                assert current_scope() is inner

        assert current_scope() is scope


def test_block_left_twice(make_app: AppFactory) -> None:
    """Blocks that are left out of order end their scopes, and leave nothing."""
    app = make_late(make_app())
    done: list[str] = []

    with app.app_context():
        outer, inner = open_scope(), open_scope()
        outer.__enter__()
        run(done.append, "outer")
        inner.__enter__()
        run(done.append, "inner")
        outer.__exit__(None, None, None)
        assert done == ["outer"]
        inner.__exit__(None, None, None)
        assert done == ["outer", "inner"]
        assert current_scope() is None


def test_wait_is_a_barrier(make_app: AppFactory) -> None:
    """After wait() what was started is done, and more can be started."""
    app = make_late(make_app())
    done: list[str] = []

    with app.test_request_context():
        wait()
        run(done.append, "first")
        run(done.append, "second")
        wait()
        assert done == ["first", "second"]
        run(done.append, "third")
        assert done == ["first", "second"]

    assert done == ["first", "second", "third"]


def test_wait_does_not_raise_what_tasks_do(make_app: AppFactory) -> None:
    """A task that failed makes wait() no error."""
    app = make_app()
    app.logger.disabled = True

    try:
        with app.test_request_context():
            future = run(divmod, 1, 0)
            wait()
            assert isinstance(future.exception(0), ZeroDivisionError)
    finally:
        app.logger.disabled = False


def test_wait_with_a_timeout(make_app: AppFactory) -> None:
    """Past its timeout wait() raises; the task goes on, and so does the scope."""
    app = make_app()
    release = threading.Event()

    with app.test_request_context():
        future = run(release.wait, PATIENCE)

        try:
            with pytest.raises(TimeoutError, match=r"1 .* not done after 0.01 s"):
                wait(0.01)

            assert not future.done()
            assert run(str, "more").result(PATIENCE) == "more"
        finally:
            release.set()

        wait(PATIENCE)
        assert future.result(0) is True


def test_scope_that_was_shut_down(make_app: AppFactory) -> None:
    """In a request whose scope was ended early, run() is a plain call."""
    app = make_app()

    with app.test_request_context():
        scope = current_scope()
        assert scope is not None
        scope.shutdown()
        assert current_scope() is None
        assert run(threading.get_ident).result(0) == threading.get_ident()

        with pytest.raises(ScopeClosed, match=r"'builtins\.str' was submitted"):
            scope.submit(str)


def test_block_of_a_scope_that_was_shut_down(make_app: AppFactory) -> None:
    """A closed scope takes no task, and a plain call raises to its caller."""
    app = make_app()

    with app.app_context(), open_scope() as scope:
        scope.shutdown()

        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0)

        with pytest.raises(ScopeClosed):
            scope.map(str, "ab")


def test_scope_is_an_executor(make_app: AppFactory) -> None:
    """Code that takes executors or futures takes ours, with the Flask context."""
    app = make_app()

    def work(number: int) -> tuple[int, str]:
        return number, request.path

    expected = {(number, "/path") for number in range(4)}

    with app.test_request_context("/path"):
        scope = current_scope()
        assert isinstance(scope, TaskScope)
        futures = [run(work, number) for number in range(4)]
        done, not_done = concurrent.futures.wait(futures, PATIENCE)
        assert not_done == set()
        assert {future.result(0) for future in done} == expected
        completed = concurrent.futures.as_completed(futures, PATIENCE)
        assert {future.result(0) for future in completed} == expected
        assert set(scope.map(work, range(4), timeout=PATIENCE)) == expected


def test_run_in_executor(make_app: AppFactory) -> None:
    """An async view can await its tasks on the current scope."""
    app = make_app()

    def work(number: int) -> str:
        return f"{request.path}{number}"

    @app.get("/path")
    async def index() -> list[str]:
        loop = asyncio.get_running_loop()
        calls = [
            loop.run_in_executor(current_scope(), functools.partial(work, number))
            for number in range(3)
        ]
        calls.append(asyncio.wrap_future(run(work, 3)))
        return await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)

    response = in_time(app.test_client().get, "/path")
    assert response.json == ["/path0", "/path1", "/path2", "/path3"]


def test_stream_in_a_block(make_app: AppFactory) -> None:
    """A generator that opens a block ends it when the server closes the response."""
    app = make_late(make_app())
    done: list[str] = []

    @app.get("/")
    def index() -> flask.Response:
        def generate() -> cabc.Iterator[str]:
            with open_scope():
                run(done.append, "task")
                yield "1"
                yield "2"

        return flask.Response(flask.stream_with_context(generate()))

    response = app.test_client().get("/", buffered=False)
    assert next(iter(response.response)) == b"1"
    assert done == []
    response.close()
    assert done == ["task"]


def test_extension_added_later_is_found() -> None:
    """What counts is that the app has an ApiTask when open_scope is called."""
    app = Flask(__name__)

    @scoped
    def work() -> str:
        return run(str, "task").result(PATIENCE)

    ApiTask(app)

    with app.app_context():
        assert work() == "task"
