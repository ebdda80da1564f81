from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import io
import logging
import threading
import typing as t
import weakref

import pytest
from conftest import AppFactory
from conftest import PATIENCE
from conftest import wait_until
from flask import abort
from flask import Flask
from flask import g
from flask import redirect
from flask import request_finished
from flask import Response
from flask import send_file
from flask import stream_with_context
from werkzeug.test import EnvironBuilder
from werkzeug.test import run_wsgi_app

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import run_on_success
from flask_apitask import scoped
from flask_apitask import wait
from flask_apitask.context import MERGED
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.scope import TaskScope
from flask_apitask.signals import task_dropped

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask.typing import ResponseReturnValue


class Broken(Exception):
    pass


View = t.Callable[[], "ResponseReturnValue"]


class Calls:
    """What was done, and the futures of what may have been."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.futures: list[concurrent.futures.Future[None]] = []

    def put_off(self, name: str = "task") -> str:
        self.futures.append(run_on_success(self.note, name))
        return "ok"

    def note(self, name: str) -> None:
        self.done.append(name)


# An app that waits before the response is sent, or after that.
both_ends = pytest.mark.parametrize("end", ["teardown", "close"])


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return why tasks were dropped. Nothing else must have been logged of them."""
    return [
        record.getMessage().partition(" was dropped: ")[2].removesuffix(".")
        for record in caplog.records
        if " was dropped: " in record.getMessage()
    ]


def fail(error: BaseException) -> t.NoReturn:
    """Raise, where only an expression may stand."""
    raise error


OUTCOMES: dict[str, tuple[View, str | None]] = {
    "200": (lambda: "ok", None),
    "204": (lambda: ("", 204), None),
    "redirect": (lambda: redirect("/"), None),
    "304": (lambda: ("", 304), None),
    "abort with a redirect": (lambda: abort(redirect("/")), None),
    "400": (lambda: ("no", 400), "the response has the status 400"),
    "500": (lambda: ("no", 500), "the response has the status 500"),
    "abort(404)": (lambda: abort(404), "NotFound was raised"),
    "abort(Response)": (
        lambda: abort(Response(status=422)),
        "HTTPException was raised",
    ),
    # Werkzeug knows no exception for it.
    "abort(302)": (lambda: abort(302), "LookupError was raised"),
    "unhandled": (lambda: fail(Broken("secret")), "Broken was raised"),
    "handled": (lambda: fail(KeyError("secret")), "KeyError was raised"),
    "handled 410": (lambda: abort(410), "Gone was raised"),
    "not a response": (
        lambda: t.cast("str", None),
        "the response has the status 500",
    ),
}


@both_ends
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_outcomes(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    end: str,
    outcome: str,
    method: str,
) -> None:
    """A task starts if no exception left the view, and the status is below 400."""
    app, calls = make_app(APITASK_WAIT=end), Calls()
    view, reason = OUTCOMES[outcome]
    caplog.set_level(logging.INFO)

    @app.get("/<token>")
    def page(token: str) -> ResponseReturnValue:
        calls.put_off()
        return view()

    app.register_error_handler(KeyError, lambda _: "all is well")
    app.register_error_handler(410, lambda _: "all is well")
    app.test_client().open("/secret", method=method).close()
    [future] = calls.futures
    assert calls.done == ([] if reason else ["task"])
    assert reasons(caplog) == ([reason] if reason else [])
    assert future.cancelled() == bool(reason)

    if reason:
        [record] = [r for r in caplog.records if " was dropped: " in r.getMessage()]
        name = "test_on_success.Calls.note"
        text = f"Task {name!r} of {method} /<token> was dropped: {reason}."
        assert record.getMessage() == text
        assert record.levelno == logging.INFO
        assert vars(record)["apitask_task"] == name
        assert vars(record)["apitask_endpoint"] == "page"
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(PATIENCE)


def get(app: Flask, path: str = "/") -> int:
    """Make a request and read the response to its end, as a server does."""
    return app.test_client().get(path, buffered=True).status_code


@both_ends
def test_it_waits_for_the_request(make_app: AppFactory, end: str) -> None:
    """Nothing starts before the view has returned, and waiting there is an error."""
    app, calls = make_app(APITASK_WAIT=end), Calls()

    @app.get("/")
    def page() -> str:
        calls.put_off("first")
        calls.put_off("second")
        run(calls.note, "at once")
        wait(PATIENCE)
        assert calls.done == ["at once"]
        [first, second] = calls.futures
        assert not first.done()

        for wait_for in (first.result, second.exception):
            with pytest.raises(RuntimeError, match=r"Calls\.note' is deferred"):
                wait_for()

        return "ok"

    @app.after_request
    def note(response: Response) -> Response:
        calls.note("after_request")
        return response

    assert get(app) == 200
    assert calls.done[:2] == ["at once", "after_request"]
    assert sorted(calls.done[2:]) == ["first", "second"]
    assert all(future.result() is None for future in calls.futures)


def test_answer_comes_first(make_app: AppFactory) -> None:
    """Where the response goes first, tasks start when it has been closed."""
    app, calls = make_app(APITASK_WAIT="close"), Calls()
    app.add_url_rule("/", "page", calls.put_off)
    response = app.test_client().get("/")
    assert response.text == "ok"
    assert not calls.futures[0].done()
    response.close()
    assert calls.done == ["task"]


def test_mistakes_are_raised_at_the_call(make_app: AppFactory) -> None:
    """A task that can't be called is an error in the view."""
    app = make_app(TESTING=True)
    app.add_url_rule("/", "page", lambda: run_on_success(t.cast("t.Any", 1)))

    with pytest.raises(TypeError, match="not 1"):
        get(app)


@pytest.mark.parametrize("when", ["first", "last"])
def test_status_after_all_functions(when: str) -> None:
    """The final status counts, whatever set it."""
    app, calls = Flask(__name__), Calls()

    def spoil(response: Response) -> Response:
        response.status_code = 503
        return response

    if when == "last":
        app.after_request(spoil)

    ApiTask(app)

    if when == "first":
        app.after_request(spoil)

    app.add_url_rule("/", "page", calls.put_off)
    assert get(app) == 503
    assert calls.futures[0].cancelled()


def raise_late(response: Response) -> Response:
    """Fail, as a function for ``after_request``."""
    raise Broken(response)


def finish_badly(app: Flask, **extra: object) -> None:
    """Fail, as a receiver of ``request_finished``, but for the response to that."""
    if not g.setdefault("failed", False):
        g.failed = True
        raise Broken


@both_ends
@pytest.mark.parametrize("stage", ["after_request", "finished", "pushed"])
def test_failure_after_the_view(make_app: AppFactory, end: str, stage: str) -> None:
    """An exception after the view is a failure, however late it comes."""
    app, calls = make_app(APITASK_WAIT=end), Calls()
    app.add_url_rule("/", "page", calls.put_off)

    if stage == "after_request":
        app.after_request(raise_late)
        assert get(app) == 500
    elif stage == "finished":
        # Ours is connected before it, by the first task.
        with app.test_request_context():
            calls.put_off()

        calls.done.clear()
        calls.futures.clear()

        with request_finished.connected_to(finish_badly, app):
            assert get(app) == 500
    else:
        with contextlib.suppress(Broken), app.test_request_context():
            calls.put_off()
            raise Broken

    assert calls.futures[0].cancelled()
    assert calls.done == []


@both_ends
def test_failing_teardown(make_app: AppFactory, end: str) -> None:
    """A teardown function that fails is no success if it keeps ours from being called.

    From Flask 3.2 on it does not, and what others are called after it is not known.
    """
    app, calls = make_app(APITASK_WAIT=end), Calls()
    app.add_url_rule("/", "page", calls.put_off)
    app.teardown_request(lambda error: fail(Broken()))

    with pytest.raises(Exception, match=r"^$|during context teardown"):
        get(app)

    assert calls.futures[0].cancelled() == (not MERGED or end == "close")


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("end", "stream"), [("close", False), ("close", True), ("teardown", True)]
)
def test_response_that_a_teardown_function_keeps_back(
    caplog: pytest.LogCaptureFixture, end: str, stream: bool, earlier: bool
) -> None:
    """If there is no response to close, nothing goes on waiting for its close."""
    app, calls = Flask(__name__), Calls()
    app.config["APITASK_WAIT"] = end
    caplog.set_level(logging.INFO)

    @app.get("/")
    def page() -> Response:
        run(calls.note, "other")
        calls.put_off()
        return Response(iter(["a"]) if stream else "a")

    if not earlier:
        ApiTask(app)

    app.teardown_request(lambda error: fail(Broken()))

    if earlier:
        ApiTask(app)

    with pytest.raises(Exception, match=r"^$|during context teardown"):
        get(app)

    assert calls.futures[0].cancelled()
    assert calls.done == ["other"]
    [reason] = reasons(caplog)
    assert reason in {"Broken was raised", "ExceptionGroup was raised"}


def test_teardown_function_and_task_that_raise() -> None:
    """The exception of the teardown function is the one that leaves the request."""
    app = Flask(__name__)
    app.config.update(APITASK_WAIT="close", APITASK_PROPAGATE=True)
    app.logger.disabled = True
    app.teardown_request(lambda error: fail(Broken()))
    ApiTask(app)
    app.add_url_rule("/", "page", lambda: f"{run(fail, LookupError())}")

    with pytest.raises(Exception, match=r"^$|during context teardown") as raised:
        get(app)

    error: BaseException = raised.value

    # Flask 3.2 collects what teardown functions raise.
    while not isinstance(error, Broken):
        [error] = error.exceptions  # type: ignore[attr-defined]


def test_response_that_is_gone_when_a_teardown_function_raises() -> None:
    """There may be nothing left to close, so that the request has waited already."""
    app, calls = Flask(__name__), Calls()
    app.config["APITASK_WAIT"] = "close"
    app.teardown_request(lambda error: fail(Broken()))
    ApiTask(app)
    app.add_url_rule("/", "page", calls.put_off)
    dispatch: t.Any = app.full_dispatch_request
    raised = pytest.raises(Exception, match=r"^$|during context teardown")

    with raised, app.test_request_context() as context:
        dispatch(*[context] * MERGED)

    assert calls.done == ["task"]


def test_exception_that_is_handled_in_the_view(make_app: AppFactory) -> None:
    """An exception that the view catches does not count."""
    app, calls = make_app(), Calls()

    @app.get("/")
    def page() -> str:
        try:
            raise Broken
        except Broken:
            calls.put_off()

        return "ok"

    assert get(app) == 200
    assert calls.done == ["task"]


@pytest.mark.parametrize("used_before", [False, True])
def test_error_handlers_own_task(make_app: AppFactory, used_before: bool) -> None:
    """A task deferred in an error handler belongs to a failed request."""
    app, calls = make_app(), Calls()
    app.add_url_rule("/", "page", lambda: fail(Broken()))
    app.add_url_rule("/good", "good", lambda: calls.put_off("good"))
    app.register_error_handler(Broken, lambda _: calls.put_off())

    if used_before:
        get(app, "/good")

    assert get(app) == 200
    assert calls.futures[-1].cancelled()
    assert calls.done == ["good"] * used_before


@pytest.mark.parametrize("used_before", [False, True])
def test_replaced_handler(make_app: AppFactory, used_before: bool) -> None:
    """Another extension's handling of exceptions still works, and they are noticed."""
    app, calls = make_app(), Calls()
    app.add_url_rule("/", "page", lambda: calls.put_off() and fail(Broken()))
    app.add_url_rule("/good", "good", lambda: calls.put_off("good"))
    seen = []

    if used_before:
        get(app, "/good")

    def handle(*args: t.Any) -> str:
        # It is bound to the app already.
        assert app not in args
        seen.append(args[-1])
        return "all is well"

    app.handle_user_exception = handle  # type: ignore[assignment, method-assign]
    assert [get(app), get(app)] == [200, 200]
    assert [type(error) for error in seen] == [Broken, Broken]
    assert all(future.cancelled() for future in calls.futures[used_before:])
    assert calls.done == ["good"] * used_before


def test_handler_that_tests_replace_and_put_back(make_app: AppFactory) -> None:
    """However often that happens, no more than one method of ours is in front."""
    app, calls = make_app(), Calls()
    app.add_url_rule("/", "page", calls.put_off)
    get(app)
    ours = app.handle_user_exception

    @functools.wraps(ours)
    def handle(*args: t.Any) -> t.Any:
        return "all is well"

    app.handle_user_exception = handle  # type: ignore[assignment, method-assign]
    get(app)
    assert app.handle_user_exception not in {ours, handle}
    app.handle_user_exception = ours  # type: ignore[method-assign]
    get(app)
    assert app.handle_user_exception is ours


def test_apps_that_put_nothing_off(make_app: AppFactory) -> None:
    """Without deferred tasks, nothing of Flask's is replaced and no signal received."""
    app = make_app()
    app.add_url_rule("/", "page", lambda: run(str).result())
    get(app)
    assert "handle_user_exception" not in vars(app)
    assert list(request_finished.receivers_for(app)) == []


@pytest.mark.usefixtures("without_gc")
def test_nothing_is_kept(make_app: AppFactory) -> None:
    """The app and the arguments of a task go with their last reference."""
    app = make_app()

    class Argument: ...

    references: list[weakref.ref[t.Any]] = [weakref.ref(app)]

    def page(status: int) -> tuple[str, int]:
        argument = Argument()
        references.append(weakref.ref(argument))
        run_on_success(id, argument)
        return "", status

    app.add_url_rule("/<int:status>", "page", page)
    assert [get(app, "/200"), get(app, "/404")] == [200, 404]
    assert [reference() for reference in references[1:]] == [None, None]
    app.view_functions.clear()
    del app, page
    # Its threads may be about to let go of it.
    wait_until(lambda: references[0]() is None)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_calls_in_teardown(failed: bool, earlier: bool) -> None:
    """After the response, an exception is what counts, before the wait and after it."""
    app, calls = Flask(__name__), Calls()

    def put_off(error: BaseException | None) -> None:
        calls.put_off()

    if not earlier:
        app.teardown_request(put_off)

    ApiTask(app)

    if earlier:
        app.teardown_request(put_off)

    app.add_url_rule("/", "page", lambda: fail(Broken()) if failed else ("", 404))
    get(app)
    assert calls.done == ([] if failed else ["task"])
    assert calls.futures[0].cancelled() == failed


@both_ends
@pytest.mark.parametrize("how", ["whole", "error", "left"])
def test_calls_in_a_stream(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, end: str, how: str
) -> None:
    """A task deferred in a stream with context waits for the stream's end."""
    app, calls = make_app(APITASK_WAIT=end), Calls()
    caplog.set_level(logging.INFO)

    def stream() -> cabc.Iterator[str]:
        yield "first"
        calls.put_off()

        if how == "error":
            raise Broken

        yield "last"
        assert calls.done == []

    app.add_url_rule("/", "page", lambda: Response(stream_with_context(stream())))
    body, *_ = run_wsgi_app(app, EnvironBuilder("/").get_environ())

    with pytest.raises(Broken) if how == "error" else contextlib.nullcontext():
        for item in body:
            if how == "left" and item == b"last":
                break

    body.close()  # type: ignore[attr-defined]
    assert calls.futures[0].cancelled() == (how != "whole")
    assert calls.done == (["task"] if how == "whole" else [])
    texts = {
        "error": "Broken was raised",
        "left": "the stream or block was closed before its end",
    }
    assert reasons(caplog) == ([texts[how]] if how in texts else [])


@both_ends
@pytest.mark.parametrize("how", ["whole", "error", "left", "close", "unread", "HEAD"])
@pytest.mark.parametrize("with_context", [False, True])
def test_streams(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    end: str,
    how: str,
    with_context: bool,
) -> None:
    """A stream has succeeded when it reached its end without an exception."""
    app, calls = make_app(APITASK_WAIT=end), Calls()
    caplog.set_level(logging.INFO)

    def stream() -> cabc.Iterator[str]:
        try:
            yield "a" * 10
            calls.note("streamed")

            if how == "error":
                raise Broken

            yield "b" * 10
        finally:
            if how == "close":
                raise KeyError

    @app.get("/")
    def page() -> Response:
        calls.put_off()
        run(calls.note, "at once").result(PATIENCE)
        return Response(stream_with_context(stream()) if with_context else stream())

    environ = EnvironBuilder("/", method="HEAD" if how == "HEAD" else "GET")
    body, *_ = run_wsgi_app(app, environ.get_environ())

    # The test client has read the first of it.
    if how in {"whole", "error"}:
        expected = pytest.raises(Broken) if how == "error" else contextlib.nullcontext()

        with expected:
            assert b"".join(body) == b"a" * 10 + b"b" * 10

        assert calls.done[-1] == "streamed"

    if how == "close":
        with pytest.raises(KeyError):
            body.close()  # type: ignore[attr-defined]
    else:
        body.close()  # type: ignore[attr-defined]

    if how in {"whole", "HEAD"}:
        assert calls.done[-1] == "task"
        assert calls.futures[0].result(PATIENCE) is None
    elif how != "unread":
        assert calls.futures[0].cancelled()
        [reason] = reasons(caplog)
        error = {"error": "Broken was raised", "close": "KeyError was raised"}
        closed = "the stream or block was closed before its end"
        assert reason == error.get(how, closed)


@both_ends
@pytest.mark.parametrize("fails", [False, True])
def test_tasks_of_tasks_of_a_stream(
    make_app: AppFactory, end: str, fails: bool
) -> None:
    """What a task defers during a stream waits for the stream's end, too."""
    app, calls = make_app(APITASK_WAIT=end), Calls()
    begun, put_off = threading.Event(), threading.Event()

    def work() -> None:
        assert begun.wait(PATIENCE)
        calls.put_off()
        put_off.set()

    def stream() -> cabc.Iterator[str]:
        yield "first"
        begun.set()
        assert put_off.wait(PATIENCE)
        assert calls.done == []

        if fails:
            raise Broken

    @app.get("/")
    def page() -> Response:
        run(work)
        return Response(stream())

    @app.teardown_request
    def begin(error: BaseException | None) -> None:
        if end == "teardown":
            begun.set()

    with app.app_context():
        # An app is watched from the first call on.
        run_on_success(int)

    with pytest.raises(Broken) if fails else contextlib.nullcontext():
        get(app)

    assert calls.done == ([] if fails else ["task"])
    assert calls.futures[0].cancelled() == fails


@pytest.mark.parametrize("cause", ["interrupt", "propagate"])
def test_stream_that_is_never_sent(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    """If the wait before a stream raises, no response is sent, so nothing is pending.

    Tasks that are still deferred are dropped, and the scopes of functions are ended.
    """
    app, calls = make_app(APITASK_PROPAGATE=cause == "propagate"), Calls()
    caplog.set_level(logging.INFO)
    begun, released = threading.Event(), threading.Event()

    def interrupt() -> t.NoReturn:
        released.set()
        raise KeyboardInterrupt

    def put_off_late() -> None:
        begun.set()
        assert released.wait(PATIENCE)
        calls.put_off("late")

    @app.get("/")
    def page() -> Response:
        scoped(wait="close")(run)(calls.note, "left")
        calls.put_off("early")

        if cause == "propagate":
            run(fail, Broken())
        else:
            run(put_off_late)
            assert begun.wait(PATIENCE)
            t.cast("t.Any", current_scope()).end = interrupt

        return Response(iter(["a"]))

    # Flask 3.2 collects whatever a teardown raises.
    with pytest.raises(BaseException, match=r"^$|Errors during"):
        get(app)

    assert concurrent.futures.wait(calls.futures, PATIENCE).not_done == set()
    assert calls.done == ["left"]
    wait_until(lambda: len(calls.futures) == (2 if cause == "interrupt" else 1))
    assert all(future.cancelled() for future in calls.futures)
    assert set(reasons(caplog)) - {""} == {"no response was sent"}


def test_file(make_app: AppFactory) -> None:
    """A file is left to the server, which may have its own way to send it."""
    app, calls = make_app(), Calls()

    @app.get("/")
    def page() -> Response:
        calls.put_off()
        return send_file(io.BytesIO(b"content"), "text/plain")

    response = app.test_client().get("/")
    assert calls.done == ["task"]
    assert response.data == b"content"
    response.close()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["open", "sync", "async", "close"])
def test_blocks(make_app: AppFactory, kind: str, fails: bool) -> None:
    """A block, or a function, has succeeded when it was left without an exception."""
    app, calls = make_app(), Calls()

    def act() -> str:
        calls.put_off()
        assert calls.done == []
        return fail(Broken()) if fails else "bad request"

    async def act_async() -> str:
        await asyncio.sleep(0)
        return act()

    def act_in_block() -> str:
        with open_scope():
            return act()

    views: dict[str, cabc.Callable[[], t.Any]] = {
        "open": act_in_block,
        "sync": scoped(act),
        "async": scoped(act_async),
        "close": scoped(wait="close")(act),
    }

    @app.get("/")
    def page() -> ResponseReturnValue:
        try:
            return app.ensure_sync(views[kind])(), 400
        except Broken:
            return "caught"

    assert get(app) == (200 if fails else 400)
    assert calls.futures[0].cancelled() == fails
    assert calls.done == ([] if fails else ["task"])


def test_async_view(make_app: AppFactory) -> None:
    """An async view can defer tasks, but not await them."""
    app, calls = make_app(), Calls()

    @app.get("/")
    async def page() -> str:
        calls.put_off()

        with pytest.raises(RuntimeError, match="is deferred"):
            await t.cast("t.Any", calls.futures[0])

        return "ok"

    assert get(app) == 200
    assert calls.done == ["task"]


def test_nested_requests(make_app: AppFactory) -> None:
    """Each request waits for its own success."""
    app, calls = make_app(), Calls()

    @app.get("/inner/<int:status>")
    def inner(status: int) -> tuple[str, int]:
        calls.put_off(f"inner {status}")
        return "", status

    @app.get("/")
    def outer() -> tuple[str, int]:
        calls.put_off("outer")
        get(app, "/inner/200")
        get(app, "/inner/404")
        assert calls.done == ["inner 200"]
        return "", 200

    assert get(app) == 200
    assert calls.done == ["inner 200", "outer"]


def test_plain_calls(make_app: AppFactory) -> None:
    """Where there is no scope, a task is called at once, and raises there."""
    calls = Calls()
    calls.put_off("no app")
    app = make_app(APITASK_ENABLED=False)

    with app.app_context():
        calls.put_off("no request")

        with pytest.raises(Broken):
            run_on_success(fail, Broken())

    @app.get("/")
    def page() -> tuple[str, int]:
        calls.put_off("no scope")
        assert calls.done == ["no app", "no request", "no scope"]
        return "", 404

    assert get(app) == 404


@pytest.mark.parametrize("status", [200, 404])
def test_tasks_of_tasks(make_app: AppFactory, status: int) -> None:
    """A task deferred in another task waits for the request of that task."""
    app, calls = make_app(), Calls()
    settled = threading.Event()

    def put_off_early() -> None:
        calls.put_off("early")

    def put_off_late() -> None:
        assert settled.wait(PATIENCE)
        calls.put_off("late")

    @app.get("/")
    def page() -> tuple[str, int]:
        run(put_off_late)
        run(put_off_early).result(PATIENCE)
        assert calls.done == []
        # It is settled by then.
        scope = t.cast("TaskScope", current_scope())
        settle = scope.settle

        def settle_and_tell(failure: str | None) -> bool:
            started = settle(failure)
            settled.set()
            return started

        scope.settle = settle_and_tell  # type: ignore[method-assign]
        return "", status

    get(app)
    assert sorted(calls.done) == (["early", "late"] if status == 200 else [])
    assert [future.cancelled() for future in calls.futures] == [status == 404] * 2


def test_futures_of_dropped_tasks(make_app: AppFactory) -> None:
    """The signal and callbacks tell of a dropped task, however it was dropped."""
    app, calls = make_app(), Calls()
    told: list[t.Any] = []

    def receive(sender: Flask, submitted: float, **fields: object) -> None:
        told.append((sender, fields))

    @app.get("/")
    def page() -> tuple[str, int]:
        calls.put_off("dropped")
        calls.put_off("cancelled")
        [dropped, cancelled] = calls.futures
        dropped.add_done_callback(lambda future: told.append(future))
        assert cancelled.cancel()
        return "", 404

    with task_dropped.connected_to(receive):
        get(app)

    [dropped, cancelled] = calls.futures
    assert concurrent.futures.wait([dropped], PATIENCE).done == {dropped}
    name, reason = "test_on_success.Calls.note", "the response has the status 404"
    fields = {"name": name, "args": ("dropped",), "kwargs": {}, "reason": reason}
    other = {**fields, "args": ("cancelled",), "reason": "it was cancelled"}
    # The callback has a thread of its own.
    told.remove(dropped)
    assert told == [(app, fields), (app, other)]
    assert cancelled.cancelled()
    told.clear()
    calls.futures.clear()


def test_cancelled_by_the_view(make_app: AppFactory) -> None:
    """A task that the view has cancelled does not start with the others."""
    app, calls = make_app(), Calls()

    @app.get("/")
    def page() -> str:
        calls.put_off("cancelled")
        calls.put_off("kept")
        assert calls.futures[0].cancel()
        return "ok"

    assert get(app) == 200
    assert calls.done == ["kept"]


def test_shutdown(make_app: AppFactory) -> None:
    """A scope that is shut down goes on to hold, unless it is to cancel."""
    app, calls = make_app(), Calls()

    with app.app_context():
        with open_scope() as scope:
            calls.put_off("kept")
            scope.shutdown()

        with open_scope() as scope:
            calls.put_off("dropped")
            scope.shutdown(cancel_futures=True)
            assert calls.futures[1].cancelled()

    assert calls.done == ["kept"]


def test_deadline(make_app: AppFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for deferred tasks has the usual deadline."""
    app, calls = make_app(APITASK_TIMEOUT=0.05), Calls()
    begun, released = threading.Event(), threading.Event()
    join = TaskScope._join

    def join_late(scope: TaskScope, timeout: float | None) -> int:
        assert begun.wait(PATIENCE)
        return join(scope, timeout)

    monkeypatch.setattr(TaskScope, "_join", join_late)

    def hold_up() -> None:
        begun.set()
        assert released.wait(PATIENCE)

    @app.get("/")
    def page() -> str:
        calls.futures.append(run_on_success(hold_up))
        return "ok"

    assert get(app) == 200
    assert not calls.futures[0].done()
    released.set()
    calls.futures[0].result(PATIENCE)


def test_deadline_before_a_stream(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """What the end of the request gave up is not waited for after the stream again.

    Nor does what it defers then wait for anything.
    """
    app, calls = make_app(APITASK_TIMEOUT=0.05), Calls()
    begun, released = threading.Event(), threading.Event()
    futures: list[concurrent.futures.Future[None]] = []

    def hold_up() -> None:
        begun.set()
        assert released.wait(PATIENCE)
        calls.put_off()

    @app.get("/")
    def page() -> Response:
        futures.append(run(hold_up))
        assert begun.wait(PATIENCE)
        return Response(iter(["a", "b"]))

    with app.app_context():
        # An app is watched from the first call on.
        run_on_success(int)

    assert get(app) == 200
    assert len(caplog.records) == 1
    released.set()
    futures[0].result(PATIENCE)
    assert calls.done == ["task"]


def test_stream_that_fails_after_a_deadline(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that was given up before a stream still waits for the stream's success."""
    app, calls = make_app(APITASK_TIMEOUT=0.05), Calls()
    begun, released, deferred = (threading.Event() for _ in range(3))

    def hold_up() -> None:
        begun.set()
        assert released.wait(PATIENCE)
        calls.put_off()
        deferred.set()

    def stream() -> cabc.Iterator[str]:
        yield "a"
        released.set()
        assert deferred.wait(PATIENCE)
        raise Broken

    @app.get("/")
    def page() -> Response:
        run(hold_up)
        assert begun.wait(PATIENCE)
        return Response(stream())

    with app.app_context():
        # An app is watched from the first call on.
        run_on_success(int)

    with pytest.raises(Broken):
        get(app)

    assert calls.done == []
    assert calls.futures[0].cancelled()


def test_forked_child() -> None:
    """Tasks deferred before a fork are left to the parent."""
    pool = ThreadPool(0)
    scope = TaskScope(pool, 1)
    future = scope.hold(fail, (Broken(),), {}, for_success=True)
    # As in the child.
    pool.generation += 1
    scope.settle(None)
    scope.start(t.cast("t.Any", future))
    scope.drop("of a test", t.cast("t.Any", future))
    assert not scope.let_go(t.cast("t.Any", future))
    assert scope.hold(print, (), {}, for_success=True) is None
    assert future is not None
    assert not future.done()
    scope.end()


@pytest.mark.parametrize("failure", [None, "the block failed"])
def test_first_outcome_counts(failure: str | None) -> None:
    """The outcome of a block does not change afterwards."""
    scope = TaskScope(ThreadPool(0), 1)
    scope.settle(failure)
    scope.settle("the stream failed" if failure is None else None)
    future = scope.hold(print, (), {}, for_success=True)
    assert (future is not None and future.cancelled()) == (failure is not None)
    scope.end()


def test_start_and_drop_are_for_what_is_held(make_app: AppFactory) -> None:
    """A task that was not deferred is neither started nor dropped."""
    done: list[int] = []

    with make_app().app_context(), open_scope() as scope:
        future = scope.submit(done.append, 1)
        scope.start(future)
        scope.drop("of a test", future)
        future.result(PATIENCE)

    assert done == [1]


def test_body_without_close(make_app: AppFactory) -> None:
    """A stream may be anything that can be iterated over, once it is begun."""
    app, calls = make_app(), Calls()

    @app.get("/")
    def page() -> Response:
        calls.put_off()
        return Response(iter(["a", "b"]))

    assert app.test_client().get("/", buffered=True).text == "ab"
    assert calls.done == ["task"]
