from __future__ import annotations

import io
import threading
import typing as t
import weakref

import flask
import pytest
from conftest import PATIENCE
from flask import Flask
from scopes import fail
from scopes import Gate
from scopes import Payload

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import run_on_success
from flask_apitask import scoped
from flask_apitask import task
from flask_apitask.testing import record_tasks

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory


@task("numbers.half")
def half(number: int, by: int = 2) -> float:
    """Divide, as a task."""
    return number / by


def both(of_task: BaseException, of_view: BaseException) -> None:
    """Start a task that fails, and fail."""
    run(fail, of_task)
    fail(of_view)


def answer(app: Flask, view: cabc.Callable[[], object], rule: str = "/") -> None:
    """Give an app a view, whatever that returns."""

    def full_view() -> str:
        view()
        return "ok"

    app.add_url_rule(rule, rule, full_view)


def test_record_of_tasks(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A record has all that is known of a task that ran, or that failed."""
    app, error = make_app(), LookupError()
    answer(app, lambda: [run(half, 3, by=2), run(fail, error)])

    with record_tasks() as tasks:
        assert app.test_client().get("/").text == "ok"

    done, failed = tasks
    assert (done.name, done.args, done.kwargs) == ("numbers.half", (3,), {"by": 2})
    assert (done.how, done.result, done.exception) == ("thread", 1.5, None)
    assert (failed.name, failed.args) == ("scopes.fail", (error,))
    assert (failed.how, failed.result, failed.exception) == ("thread", None, error)
    assert 0 <= done.duration < PATIENCE
    assert not done.dropped
    assert not failed.dropped
    assert repr(done).startswith("RecordedTask(name='numbers.half', args=(3,), ")


def test_record_of_a_plain_call(make_app: AppFactory) -> None:
    """Plain calls are recorded too, outside of a request and in a task."""
    app = make_app()

    def outer() -> float:
        return run(half, 6).result()

    with record_tasks() as tasks:
        with app.app_context():
            run(half, 4)

        with app.test_request_context():
            run(outer)

    assert [task.how for task in tasks] == ["inline", "thread", "inline"]
    assert [task.result for task in tasks] == [2, 3, 3]


def test_records_are_in_order_of_start(make_app: AppFactory) -> None:
    """A task that was started first is first in the list, though it is done last."""
    app, gate = make_app(), Gate()

    def view() -> None:
        run(gate)
        run(half, 1).result(PATIENCE)
        gate.opened.set()

    answer(app, view)

    with record_tasks() as tasks:
        app.test_client().get("/")

    assert [task.result for task in tasks] == ["through", 0.5]


def test_record_of_a_cancelled_task(make_app: AppFactory) -> None:
    """A task that was cancelled counts as dropped, in its place in the order."""
    app, gate = make_app(APITASK_MAX_WORKERS=1), Gate()

    def view() -> None:
        run(gate)
        assert run(half, 1).cancel()
        run(half, 2)
        gate.opened.set()

    answer(app, view)

    with record_tasks() as tasks:
        app.test_client().get("/")

    dropped = tasks[1]
    assert [task.dropped for task in tasks] == [False, True, False]
    assert (dropped.name, dropped.args) == ("numbers.half", (1,))
    assert dropped.how == "dropped"
    assert dropped.result is dropped.exception is None
    assert dropped.duration == 0


def test_record_of_a_task_that_was_put_off(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that waits for success is dropped where there is none, in its place."""
    app = make_app()
    answer(app, lambda: [run_on_success(half, 1), run(half, 2)], "/good")
    answer(app, lambda: [run_on_success(half, 3), run(half, 4), flask.abort(404)])

    with record_tasks() as tasks:
        app.test_client().get("/")
        app.test_client().get("/good")

    found = [(task.args, task.dropped, task.how) for task in tasks]
    assert found == [
        ((3,), True, "dropped"),
        ((4,), False, "thread"),
        ((1,), False, "thread"),
        ((2,), False, "thread"),
    ]


def test_record_of_a_task_at_its_deadline(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that has not begun at the deadline counts as dropped."""
    app, gate = make_app(APITASK_MAX_WORKERS=1, APITASK_TIMEOUT=0.05), Gate()
    answer(app, lambda: [run(gate), gate.begun.wait(PATIENCE), run(half, 1)])

    with record_tasks() as tasks:
        app.test_client().get("/")
        (dropped,) = tasks
        gate.opened.set()

    assert dropped.dropped
    assert dropped.args == (1,)
    gate.threads[0].join(0.01)


def test_records_of_threads_and_of_nested_blocks(make_app: AppFactory) -> None:
    """Each block has the tasks that ran during it, of every thread; or of one app."""
    app, other = make_app(), make_app()
    answer(app, lambda: run(half, 1))
    answer(other, lambda: run(half, 2))

    def get(app: Flask) -> None:
        thread = threading.Thread(target=lambda: app.test_client().get("/"))
        thread.start()
        thread.join(PATIENCE)

    with record_tasks() as outer, record_tasks(other) as of_other:
        get(app)

        with record_tasks() as inner:
            get(other)

        get(app)

    get(app)
    assert [task.args for task in outer] == [(1,), (2,), (1,)]
    assert [task.args for task in of_other] == [(2,)]
    assert [task.args for task in inner] == [(2,)]


def test_app_to_record(make_app: AppFactory) -> None:
    """The proxy counts as an app, and anything else is refused before the block."""
    app: t.Any = flask.current_app

    with make_app().app_context(), record_tasks(app) as tasks:
        run(half, 3)

    assert [task.name for task in tasks] == ["numbers.half"]
    app = make_app().test_client()

    with pytest.raises(TypeError, match=r"takes a Flask app, or nothing, not <Flask"):
        record_tasks(app).__enter__()


def test_nothing_is_kept_of_a_task_that_is_not_recorded(
    make_app: AppFactory, without_gc: None
) -> None:
    """Arguments and results go with the request, though somebody has listened."""
    app = make_app()
    kept: list[weakref.ref[Payload]] = []

    def work(payload: Payload) -> Payload:
        result = Payload()
        kept.extend([weakref.ref(payload), weakref.ref(result)])
        return result

    answer(app, lambda: run(work, Payload()))

    with record_tasks() as tasks:
        app.test_client().get("/")
        assert len(kept) == 2
        assert None not in [reference() for reference in kept]
        tasks.clear()
        assert {reference() for reference in kept} == {None}


@pytest.mark.parametrize("wait", ["teardown", "close"])
def test_propagate(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, wait: str
) -> None:
    """The end of a request raises what a task raised first, and that is logged once."""
    app = make_app(APITASK_PROPAGATE=True, APITASK_WAIT=wait)
    error = LookupError()

    def late(gate: Gate) -> None:
        gate()
        raise KeyError

    def view() -> None:
        gate = Gate()
        run(late, gate)
        run(fail, error).exception(PATIENCE)
        gate.opened.set()

    answer(app, view)
    answer(app, lambda: run(half, 1), "/good")
    client = app.test_client()

    for _ in range(2):
        with pytest.raises(LookupError) as excinfo:
            client.get("/", buffered=True)

        assert excinfo.value is error
        assert client.get("/good", buffered=True).text == "ok"

    assert len(caplog.records) == 4


def test_propagate_is_off(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A test of a response sees that response, though a task has failed."""
    app = make_app(TESTING=True)
    answer(app, lambda: run(fail, LookupError()))
    assert app.test_client().get("/").text == "ok"


def test_propagate_replaces_the_views_own_exception(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """If the view fails too, its exception is the context of the task's."""
    app = make_app(APITASK_PROPAGATE=True, TESTING=True)
    of_task, of_view = LookupError(), KeyError()
    answer(app, lambda: both(of_task, of_view))
    answer(app, lambda: run(fail, of_task).result(), "/consumed")

    with pytest.raises(LookupError) as excinfo:
        app.test_client().get("/")

    assert excinfo.value is of_task
    assert of_task.__context__ is of_view

    with pytest.raises(LookupError) as excinfo:
        app.test_client().get("/consumed")

    assert excinfo.value is of_task


def test_propagate_leaves_other_teardowns_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All teardown functions have run, and uploads are closed, when it is raised."""
    app = Flask(__name__)
    app.config["APITASK_PROPAGATE"] = "true"
    events: list[str] = []
    uploads: list[t.IO[bytes]] = []

    @app.teardown_request
    def before(error: BaseException | None) -> None:
        events.append("before")

    ApiTask(app)
    app.teardown_request(lambda error: events.append("after"))

    @app.post("/")
    def view() -> str:
        uploads.append(flask.request.files["file"].stream)
        run(fail, LookupError())
        return "ok"

    with pytest.raises(LookupError):
        app.test_client().post("/", data={"file": (io.BytesIO(b"file"), "name")})

    assert events == ["after", "before"]
    assert uploads[0].closed


def test_propagate_in_a_block(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A block raises at its end, and only that."""
    app = make_app(APITASK_PROPAGATE=True)

    with app.app_context():
        with pytest.raises(LookupError), open_scope():
            run(fail, LookupError())

        with pytest.raises(LookupError), open_scope():
            both(LookupError(), KeyError())

    def view() -> None:
        with pytest.raises(LookupError), open_scope():
            run(fail, LookupError())

    answer(app, view)
    assert app.test_client().get("/").text == "ok"


@pytest.mark.parametrize("is_async", [False, True])
def test_propagate_in_a_scoped_view(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, is_async: bool
) -> None:
    """A scoped view raises where it returns, so that an error handler may see it."""
    app = make_app(APITASK_PROPAGATE=True)

    @scoped
    def view() -> str:
        run(fail, LookupError())
        return "ok"

    @scoped
    async def async_view() -> str:
        run(fail, LookupError())
        return "ok"

    app.add_url_rule("/", view_func=async_view if is_async else view)
    app.register_error_handler(LookupError, lambda error: ("handled", 418))
    assert app.test_client().get("/").status_code == 418


def test_propagate_where_a_scoped_view_answers_first(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A scope that ends with the response raises when the response is closed."""
    app = make_app(APITASK_PROPAGATE=True)

    @app.get("/")
    @scoped(wait="close")
    def view() -> str:
        run(fail, LookupError())
        return "ok"

    response = app.test_client().get("/")
    assert response.text == "ok"

    with pytest.raises(LookupError):
        response.close()


def test_propagate_the_first_of_two_scopes() -> None:
    """The end of the request raises it, after all teardown functions."""
    app = Flask(__name__)
    app.config["APITASK_PROPAGATE"] = True
    torn_down: list[object] = []
    # It runs after the wait.
    app.teardown_request(torn_down.append)
    ApiTask(app)

    @scoped(wait="close")
    def answer_first() -> None:
        run(fail, LookupError())

    @app.get("/")
    def view() -> str:
        answer_first()
        run(fail, ZeroDivisionError())
        return "ok"

    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/")

    assert torn_down == [None]


def test_propagate_from_a_request_in_a_view(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A request made within a view raises there, and the outer one goes on."""
    app = make_app(APITASK_PROPAGATE=True)
    answer(app, lambda: run(fail, LookupError()), "/inner")

    def view() -> None:
        with pytest.raises(LookupError):
            app.test_client().get("/inner")

    answer(app, view)
    assert app.test_client().get("/").text == "ok"


def test_propagate_in_a_test_request_context(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A pushed context raises at its end, and in a client's block it does so once."""
    app = make_app(APITASK_PROPAGATE=True)
    answer(app, lambda: run(fail, LookupError()))

    with pytest.raises(LookupError), app.test_request_context():
        run(fail, LookupError())

    client = app.test_client()

    # Before Flask 3.2 the request raises, since then the block does.
    with pytest.raises(LookupError), client:
        client.get("/")


def test_propagated_exceptions_are_freed(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, without_gc: None
) -> None:
    """An exception that was raised at the end is not kept."""
    app = make_app(APITASK_PROPAGATE=True)
    # A record of it would keep it.
    caplog.set_level("CRITICAL", app.logger.name)
    kept: list[weakref.ref[Payload]] = []

    def work() -> None:
        payload = Payload()
        kept.append(weakref.ref(payload))
        raise LookupError

    answer(app, lambda: run(work))

    with pytest.raises(LookupError):
        app.test_client().get("/")

    assert [reference() for reference in kept] == [None]
