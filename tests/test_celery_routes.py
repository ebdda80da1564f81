"""Which tasks go to Celery, and how they are known there, without a broker."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import re
import subprocess
import sys
import threading
import typing as t
import uuid

import pytest
from flask import Flask
from flask import g

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import run
from flask_apitask import task
from flask_apitask import task_finished
from flask_apitask.routes import find_route

pytest.importorskip("celery")

from celery import Celery
from celery import current_task
from celery.exceptions import Ignore
from celery_app import celery_init_app
from celery_app import describe
from celery_app import double
from celery_app import fail

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from celery_app import Celeries

EAGER = {"task_always_eager": True}
ROUTES = {"APITASK_ROUTES": {"report.*": "celery", "flask_mail.send": "celery"}}


@pytest.fixture
def name() -> str:
    """Return a name that no other test has used, and that goes to Celery."""
    return f"report.{uuid.uuid4().hex}"


def test_first_pattern_counts() -> None:
    """Of the patterns, the first that matches says where a task runs."""
    routes = (("a.b", "thread"), ("a.*", "celery"), ("*.c", "thread"))
    found = {name: find_route(routes, name) for name in ["a.b", "a.c", "b.c", "A.x"]}
    assert found == {"a.b": "thread", "a.c": "celery", "b.c": "thread", "A.x": "thread"}


def test_celery_is_not_installed() -> None:
    """A route to Celery without Celery stops the set-up, and nothing else needs it."""
    code = (
        "import sys; sys.modules['celery'] = None\n"
        "from flask import Flask; from flask_apitask import ApiTask\n"
        "for route in ['thread', 'celery']:\n"
        "    app = Flask(route); app.config['APITASK_ROUTES'] = {'*': route}\n"
        "    ApiTask(app)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30
    )
    assert finished.stderr.splitlines()[-1] == (
        "RuntimeError: APITASK_ROUTES sends tasks to Celery, but Celery is not"
        ' installed. Install it with: pip install "flask-apitask[celery]"'
    )


def test_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error from a broken Celery installation is raised as it is."""
    monkeypatch.delitem(sys.modules, "flask_apitask.celery", raising=False)
    monkeypatch.setitem(sys.modules, "flask_apitask.celery.set_up", None)
    app = Flask(__name__)
    app.config.update(ROUTES)

    with pytest.raises(ImportError, match=r"flask_apitask\.celery\.set_up"):
        ApiTask(app)


def test_no_celery_app(name: str) -> None:
    """A routed task in an app without Celery is an error that tells how to make one."""
    app = Flask(__name__)
    app.config.update(ROUTES)
    ApiTask(app)

    @task(name)
    def routed() -> None: ...

    text = f"Task '{name}' is routed to Celery .* no Celery app .* celery_init_app"

    with app.test_request_context(), pytest.raises(RuntimeError, match=text):
        run(routed)


def test_future_of_a_routed_task(celeries: Celeries) -> None:
    """In a scope, a thread hands the task over; the future has Celery's result."""
    app = celeries.make(CELERY=EAGER)

    with app.test_request_context():
        result: t.Any = run(double, 4).result()
        assert current_scope() is not None

    assert result.get() == 8


@pytest.mark.parametrize("order", ["tasks first", "Celery first", "ApiTask first"])
def test_late_binding(order: str, name: str, celeries: Celeries) -> None:
    """In whatever order they are set up, Celery knows the task by its name."""
    app = celeries.adopt(Flask(__name__))
    app.config.update(ROUTES, CELERY=EAGER)

    def function(number: int) -> int:
        return number + 1

    def name_it() -> None:
        task(name)(function)

    def make_celery() -> None:
        celery_init_app(app).finalize()

    steps: dict[str, cabc.Callable[[], object]] = {
        "tasks first": name_it,
        "Celery first": make_celery,
        "ApiTask first": lambda: ApiTask(app),
    }
    first = steps.pop(order)

    for step in (first, *steps.values()):
        step()

    celery_app = app.extensions["celery"]
    assert name in celery_app.tasks

    with app.test_request_context():
        future: t.Any = run(function, 1)
        assert future.result().get() == 2


@pytest.mark.parametrize("base", ["FlaskTask", "none"])
def test_context_of_a_called_task(celeries: Celeries, base: str) -> None:
    """A task is called in one context of the app, whether Celery's base pushes it."""
    app = celeries.make(CELERY=EAGER)

    if base == "none":
        app.extensions["celery"] = Celery(app.name, config_source=EAGER)

    # As a worker does: there is no context.
    called = app.extensions["celery"].tasks["report.describe"].apply()
    assert called.get() == {
        "app": app.name,
        "pushed": 1,
        "inner": app.name,
        "inner_how": ["inline"],
    }


def test_celery_app_of_no_flask_app() -> None:
    """A worker whose Celery app belongs to no Flask app says so."""
    app = Flask(__name__)
    app.config.update(ROUTES)
    ApiTask(app)

    with Celery("other", config_source=EAGER, set_as_current=False) as other:
        called = other.tasks["report.double"].apply([1])

    with pytest.raises(RuntimeError, match="No Flask app in this process has"):
        called.get()


def test_signals_of_a_called_task(celeries: Celeries) -> None:
    """A task that Celery calls sends the signals once; handing it over sends none."""
    app = celeries.make(CELERY=EAGER)
    seen: list[tuple[str, str, bool]] = []

    def receive(app: Flask, **fields: t.Any) -> None:
        punctual = fields["submitted"] <= fields["started"] <= fields["finished"]
        seen.append((fields["name"], fields["how"], punctual))

    with task_finished.connected_to(receive, app), app.test_request_context():
        run(double, 1)

    assert seen == [("report.double", "celery", True)]


def test_failure_of_a_called_task(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that fails in Celery is one ERROR, and Celery's result has the rest."""
    app = celeries.make(CELERY=EAGER)

    with app.test_request_context():
        result: t.Any = run(fail, "no").result()

    with pytest.raises(LookupError, match="no"):
        result.get()

    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.getMessage().startswith("Task 'report.fail' ")
    assert (record.name, record.funcName) == (app.name, "fail")
    assert record.exc_info is not None


def test_words_of_celery_are_no_failure(
    celeries: Celeries, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception that is meant for Celery, such as a retry, is left to Celery."""
    app = celeries.make(CELERY=EAGER)

    @task(name)
    def ignored() -> None:
        raise Ignore

    with app.test_request_context():
        result: t.Any = run(ignored).result()

    assert result.state == "IGNORED"
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_outside_of_a_request(celeries: Celeries) -> None:
    """Without a scope the task is handed over at once; in a task it is a plain call."""
    app = celeries.make(CELERY=EAGER)

    with app.app_context():
        handed_over: t.Any = run(double, 4)
        assert handed_over.result().get() == 8

    def outer() -> int:
        return run(double, 4).result()

    with app.test_request_context():
        assert run(outer).result() == 8

    assert run(double, 4).result() == 8


def test_async_task(celeries: Celeries, name: str) -> None:
    """An async function works in Celery as it does on threads."""
    app = celeries.make(CELERY=EAGER)

    @task(name)
    async def wait() -> str:
        return "waited"

    with app.test_request_context():
        result: t.Any = run(wait).result()

    assert result.get() == "waited"


def test_view_gets_a_result_while_another_task_runs(
    celeries: Celeries, name: str
) -> None:
    """With ``task_always_eager`` too, tasks run at once and results can be got."""
    app = celeries.make(CELERY=EAGER)
    begun, got = threading.Event(), threading.Event()

    @task(name)
    def wait() -> bool:
        begun.set()
        return got.wait(10)

    with app.test_request_context():
        waiting: t.Any = run(wait)
        assert begun.wait(10)
        result: t.Any = run(double, 4).result()
        assert result.get() == 8
        got.set()
        assert waiting.result().get() is True


@pytest.mark.parametrize("by", ["APITASK_PROPAGATE", "task_eager_propagates"])
def test_eager_failure(
    celeries: Celeries, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure that is raised to the caller is raised and logged once."""
    propagate = by == "APITASK_PROPAGATE"
    celery = {**EAGER, "task_eager_propagates": not propagate}
    app = celeries.make(CELERY=celery, APITASK_PROPAGATE=propagate)

    @app.get("/")
    def view() -> str:
        future = run(fail, "in the view")
        assert isinstance(future.exception(), LookupError)
        return "ok"

    with contextlib.ExitStack() as stack:
        if propagate:
            stack.enter_context(pytest.raises(LookupError, match="in the view"))

        app.test_client().get("/")

    (record,) = caplog.records
    assert record.getMessage().startswith("Task 'report.fail' of GET / failed after")

    with app.app_context(), pytest.raises(LookupError, match="outside"):
        run(fail, "outside")

    assert len(caplog.records) == 1


def test_eager_retries(celeries: Celeries, name: str) -> None:
    """The exception that asks for a retry is not raised at the end of the request."""
    app = celeries.make(CELERY=EAGER, APITASK_PROPAGATE=True)
    attempts = []

    @task(name)
    def try_twice() -> None:
        attempts.append(1)

        if len(attempts) < 2:
            raise current_task.retry(countdown=0)

    app.add_url_rule("/", view_func=lambda: str(run(try_twice).done()))
    assert app.test_client().get("/").status_code == 200
    assert len(attempts) == 2


def test_other_callables_stay_on_threads(
    celeries: Celeries, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that a worker could not find by its name runs here, with one WARNING."""
    app = celeries.make(CELERY=EAGER)

    @task(name)
    def named(number: int) -> int:
        raise NotImplementedError

    @functools.wraps(named)
    def wrapped(number: int) -> int:
        return number + 1

    class Unit:
        def __init__(self) -> None:
            self.name = f"{name}.unit"

        def run(self) -> int:
            return 3

    partial = task(f"{name}.partial")(functools.partial(max, 1))

    with app.test_request_context():
        assert [run(wrapped, 1).result(), run(wrapped, 1).result()] == [2, 2]
        assert run(Unit()).result() == 3
        assert run(partial, 4).result() == 4
        # These have names that no pattern matches.
        assert run(lambda: 5).result() == 5

    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 3
    assert warned[0].startswith(
        f"Task '{name}' stays on threads, although APITASK_ROUTES sends it to Celery. A"
        " worker only finds functions that have @task('...') as their outermost"
    )


def test_two_functions_of_one_name(celeries: Celeries, name: str) -> None:
    """The second function of a routed name is an error, which says where both are."""
    celeries.make(CELERY=EAGER)

    @task(name)
    def first() -> None: ...

    def second() -> None: ...

    lines = [f.__code__.co_firstlineno for f in (first, second)]
    text = f"{name!r}.*{__file__!r}, line {lines[0]} and {__file__!r}, line {lines[1]}"

    with pytest.raises(ValueError, match=text):
        task(name)(second)

    # It does not have the name then, and the first one may have it again.
    task(name)(first)


def test_two_functions_before_the_route() -> None:
    """Two functions of one name are an error once there is a route for it."""
    name = f"unrouted.{uuid.uuid4().hex}"

    @task(name)
    def first() -> None: ...

    @task(name)
    def second() -> None: ...

    app = Flask(__name__)
    app.config["APITASK_ROUTES"] = {name: "celery"}

    with pytest.raises(ValueError, match=f"Two functions have the name {name!r}"):
        ApiTask(app)

    # They may on threads, which know the functions themselves.
    other = Flask(__name__)
    other.config["APITASK_ROUTES"] = {name: "thread", "no.such": "celery"}
    ApiTask(other)


def test_function_of_a_factory(celeries: Celeries, name: str) -> None:
    """A function that is defined again counts as the same, and the old one may go."""
    app = celeries.make(CELERY=EAGER)

    def define(number: int) -> cabc.Callable[[], int]:
        @task(name)
        def made() -> int:
            return number

        return made

    first, second = define(1), define(2)

    with app.test_request_context():
        futures: list[t.Any] = [run(first), run(second)]
        # Celery has one of a name, the newest.
        assert [future.result().get() for future in futures] == [2, 2]

    del second, futures
    gc.collect()

    with app.test_request_context():
        future: t.Any = run(first)
        assert future.result().get() == 1

    celery_task = app.extensions["celery"].tasks[name]
    del first, future
    gc.collect()

    with pytest.raises(RuntimeError, match="function with this name no longer exists"):
        celery_task.apply().get()


class Model:
    """A model, as a database has it."""

    secret = "hunter2"


class Text(str):
    __slots__ = ()


CYCLE: list[t.Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (Model(), "number exactly, because it is of type 'Model'"),
        ((1, 2), "number exactly, because it is of type 'tuple'"),
        ({1, 2}, "number exactly, because it is of type 'set'"),
        (b"1", "number exactly, because it is of type 'bytes'"),
        (Text("1"), "number exactly, because it is of type 'Text'"),
        (math.nan, "number exactly, because it is not finite"),
        ([math.inf], "number[0] exactly, because it is not finite"),
        ({1: 2}, "number exactly, because it has a key that is not a string"),
        ({"a": [1, {"b": {}, "c": (1,)}]}, "number['a'][1]['c'] exactly"),
        ({"__type__": "uuid", "__value__": 1}, "with which Kombu marks other types"),
        (CYCLE, "number exactly, because it is nested too deeply, or contains itself"),
    ],
)
def test_arguments_that_json_changes(
    celeries: Celeries, value: object, cause: str
) -> None:
    """What JSON can't carry exactly is a TypeError in the view, without the value."""
    app = celeries.make()
    untyped: t.Any = double

    for args, kwargs in [((value,), {}), ((), {"number": value})]:
        with app.test_request_context():
            with pytest.raises(TypeError) as caught:
                run(untyped, *args, **kwargs)

            assert current_scope() is None or "queued=0" in repr(current_scope())

        text = str(caught.value)
        assert text.startswith("Task 'report.double' goes to Celery (APITASK_ROUTES), ")
        assert cause in text
        assert "Pass an object's id" in text
        assert "hunter2" not in text


def test_argument_without_a_name(celeries: Celeries, name: str) -> None:
    """An argument without a name is named by its number."""
    app = celeries.make()

    @task(name)
    def variadic(first: int, *others: object) -> None: ...

    with app.test_request_context():
        with pytest.raises(TypeError, match=re.escape("its argument number 3 exactly")):
            run(variadic, 1, 2, b"3")


def test_arguments_are_those_of_the_call(celeries: Celeries, name: str) -> None:
    """Changing an argument after the call has no effect, and JSON keeps the rest."""
    app = celeries.make(CELERY=EAGER)

    @task(name)
    def echo(*args: t.Any, **kwargs: t.Any) -> list[t.Any]:
        return [list(args), kwargs]

    values: list[t.Any] = ["\ud800 é", 2**70, -0.0, 1.5, True, None, {"": []}]
    expected = repr([[1, values], {"fn": values}])

    with app.test_request_context():
        future: t.Any = run(echo, 1, values, fn=values)
        values.clear()
        assert repr(future.result().get()) == expected


def test_g_of_a_handover(celeries: Celeries) -> None:
    """A worker ignores APITASK_COPY_G."""
    app = celeries.make(CELERY=EAGER, APITASK_COPY_G=("request_id",))

    with app.test_request_context():
        g.request_id = "1"
        result: t.Any = run(describe).result()

    assert result.get()["app"] == app.name
