"""Flask 3.2 merges the request context into the app context."""

from __future__ import annotations

import io
import threading
import typing as t
import weakref

import pytest
from conftest import PATIENCE
from flask import current_app
from flask import Flask
from flask import g
from flask import has_request_context
from flask import request
from flask.globals import app_ctx
from late_threads import make_late

from flask_apitask import ApiTask
from flask_apitask import context
from flask_apitask import open_scope
from flask_apitask import run

if t.TYPE_CHECKING:
    from conftest import AppFactory


def test_contexts_are_those_behind_the_proxies(make_app: AppFactory) -> None:
    """The contexts found are those of Flask's own proxies, in a task too."""
    app = make_app()
    assert context.find_app_context() is None
    assert context.find_request_context() is None

    with app.app_context() as pushed:
        assert context.find_app_context() is pushed
        assert context.find_request_context() is None

    def work() -> tuple[object, object, str]:
        return context.find_app_context(), find_behind(), request.path

    def find_behind() -> object:
        return app_ctx._get_current_object()  # type: ignore[attr-defined]

    with app.test_request_context("/path") as request_context:
        assert context.find_app_context() is find_behind()
        assert context.find_request_context() is request_context
        found, behind, path = run(work).result(PATIENCE)
        assert (found, path) == (behind, "/path")
        assert found is not find_behind()


def test_task_does_not_end_the_request(make_app: AppFactory) -> None:
    """At its end no function for teardown_request is called, and no upload closed.

    This is why ``context.py`` takes the private ``_request`` from the context.
    """
    app = make_app()
    events: list[str] = []
    app.teardown_request(lambda exc: events.append("teardown"))

    @app.post("/")
    def index() -> str:
        upload = request.files["file"]
        assert run(lambda: request.files["file"] is upload).result(PATIENCE)
        events.append("view")
        return str(upload.read(), "ascii")

    file = io.BytesIO(b"upload"), "name.txt"
    response = app.test_client().post("/", data={"file": file})
    assert response.text == "upload"
    assert events == ["view", "teardown"]


def test_request_is_not_routed_again(make_app: AppFactory) -> None:
    """A task does not undo what a url_value_preprocessor did for the view.

    This is why ``context.py`` hides the ``url_adapter`` from ``push()``.
    """
    app = make_app()

    @app.url_value_preprocessor
    def take_language(endpoint: str | None, values: dict[str, t.Any] | None) -> None:
        g.language = (values or {}).pop("language")

    @app.before_request
    def start() -> None:
        assert run(request.args.get, "q").result(PATIENCE) == "1"
        url = run(lambda: current_app.url_for("index", language="de")).result(PATIENCE)
        assert url == "/de/"

    @app.get("/<language>/")
    def index() -> str:
        return str(g.language)

    assert app.test_client().get("/en/?q=1").text == "en"


@pytest.mark.parametrize("late", [False, True])
def test_nothing_refers_to_a_context_that_was_used(
    make_app: AppFactory, without_gc: None, late: bool
) -> None:
    """A task's context is popped, so that it goes without the collector (10)."""
    app = make_late(make_app()) if late else make_app()
    gone = threading.Event()
    references: list[weakref.ref[t.Any]] = []

    def work() -> None:
        reference = weakref.ref(context.find_app_context(), lambda _: gone.set())
        references.append(reference)

    with app.test_request_context(), open_scope():
        run(work)

    assert gone.wait(PATIENCE)


@pytest.mark.parametrize("around", ["nothing", "request of another app"])
def test_task_without_a_request(make_app: AppFactory, around: str) -> None:
    """Outside of a request of its app, a task has a plain app context."""
    app = Flask("other")
    ApiTask(app)

    def work() -> tuple[str, bool]:
        return current_app.name, has_request_context()

    outer: t.Any = make_app().app_context()

    if around != "nothing":
        outer = make_app().test_request_context()

    with outer, app.app_context(), open_scope():
        name, in_request = run(work).result(PATIENCE)

    assert name == "other"
    assert in_request is (around != "nothing" and not context.MERGED)


class StandIn:
    """What Flask 3.2 has as its context, and what is done to that."""

    def __init__(self, app: Flask, request: object) -> None:
        self.app = app
        self.url_adapter: object = "adapter"
        self.has_request = request is not None
        self._request = request
        self.calls: list[object] = []
        self.copies: list[StandIn] = []

    def copy(self) -> StandIn:
        self.copies.append(StandIn(self.app, self._request))
        return self.copies[-1]

    def push(self) -> None:
        self.calls.append(("push", self._request, self.url_adapter))

    def pop(self, exc: BaseException | None) -> None:
        self.calls.append(("pop", self._request, self.url_adapter, exc))


def test_context_of_a_task_on_flask_3_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a copy, pushed without routing and popped without ending the request.

    The other tests of this module show why, where such a Flask is installed.
    """
    app = Flask(__name__)
    pushed = StandIn(app, "request")
    monkeypatch.setattr(context, "MERGED", True)
    monkeypatch.setattr(context, "find_request_context", lambda: pushed)

    def fail() -> t.NoReturn:
        with context._merged_task_context(app):
            raise LookupError

    with pytest.raises(LookupError) as excinfo:
        fail()

    (copy,) = pushed.copies
    assert copy.calls == [
        ("push", "request", None),
        ("pop", None, "adapter", excinfo.value),
    ]
    assert (pushed._request, pushed.url_adapter, pushed.calls) == (
        "request",
        "adapter",
        [],
    )

    for other in (StandIn(app, None), StandIn(Flask("other"), "request")):
        found = other if other._request else None
        monkeypatch.setattr(context, "find_request_context", lambda found=found: found)

        with context._merged_task_context(app) as plain:
            assert isinstance(plain, type(app.app_context()))

        assert other.copies == []


@pytest.mark.skipif(context.MERGED, reason="Other tests show it there.")
def test_net_is_not_needed_on_flask_3_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """All teardown functions are called there, so no app context is looked after."""
    monkeypatch.setattr("flask_apitask.extension.MERGED", True)
    monkeypatch.setattr("flask_apitask.request_scope.MERGED", True)
    app = Flask(__name__)
    ApiTask(app)
    make_late(app)
    done: list[str] = []

    with app.test_request_context():
        before = set(vars(context.find_app_context()))
        run(done.append, "task")
        assert set(vars(context.find_app_context())) == before
        assert done == []

    assert done == ["task"]
    assert app.teardown_appcontext_funcs == []
