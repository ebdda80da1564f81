from __future__ import annotations

import gc
import threading
import typing as t
import weakref

import flask
import flask.globals
import pytest
from conftest import PATIENCE
from flask import Flask
from flask import g
from flask import has_request_context
from flask import request
from flask import session
from flask.ctx import AppContext
from late_threads import make_late

from flask_apitask import ApiTask
from flask_apitask import binding
from flask_apitask import context
from flask_apitask import endings
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import stack

if t.TYPE_CHECKING:
    import contextlib
    import contextvars

MERGED = hasattr(AppContext, "has_request")


class MergedContext(AppContext):
    """What Flask 3.2 documents of its context, for Flask before that.

    It is app context and request context in one. A copy has the same request and
    session, and a ``g`` of its own. When it is popped, the ``teardown_request``
    functions are called if it handles a request, then those of ``teardown_appcontext``.
    """

    def __init__(self, app: Flask, request: t.Any, session: t.Any) -> None:
        super().__init__(app)
        self._request = request
        self.session = session
        self._request_token: t.Any = None

    @property
    def has_request(self) -> bool:
        return self._request is not None

    @property
    def request(self) -> t.Any:
        return self._request

    def copy(self) -> MergedContext:
        return type(self)(self.app, self._request, self.session)

    def push(self) -> None:
        super().push()
        self._request_token = request_variable().set(self)

    def pop(self, exc: BaseException | None = None) -> None:
        if self.has_request:
            self.app.do_teardown_request(exc)

        super().pop(exc)
        request_variable().reset(self._request_token)


def request_variable() -> contextvars.ContextVar[t.Any]:
    """Return where Flask before 3.2 looks for the request."""
    variable: contextvars.ContextVar[t.Any] = vars(flask.globals)["_cv_request"]
    return variable


def has_merged_request() -> bool:
    pushed = flask.globals._cv_app.get(None)
    return isinstance(pushed, MergedContext) and pushed.has_request


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Flask 3.2, or what the extension takes for it."""
    if MERGED:
        return

    monkeypatch.setattr(context, "has_request_context", has_merged_request)
    monkeypatch.setattr(binding, "task_context", context._merged_task_context)
    monkeypatch.setattr(context, "MERGED", True)

    for module in (context, endings, stack):
        find = context._find_merged_context
        monkeypatch.setattr(module, "find_request_context", find)


def make_merged() -> Flask:
    app = Flask(__name__)
    app.add_url_rule("/path", "index")
    ApiTask(app)
    return app


def in_request(app: Flask) -> contextlib.AbstractContextManager[object]:
    """Be in a request to ``/path?q=1``."""
    outer: t.Any = app.test_request_context("/path?q=1")

    if MERGED:
        return t.cast("contextlib.AbstractContextManager[object]", outer)

    session = app.session_interface.make_null_session(app)
    return MergedContext(app, outer.request, session)


def test_contexts_are_those_behind_the_proxies() -> None:
    """What is read from Flask's own context variables is what its proxies stand for."""
    app = make_merged()
    assert context.find_app_context() is None
    assert context.find_request_context() is None

    with app.app_context() as pushed:
        assert context.find_app_context() is pushed
        assert context.find_request_context() is None

    with app.test_request_context() as request_context:
        behind = flask.globals.app_ctx._get_current_object()  # type: ignore[attr-defined]
        assert context.find_app_context() is behind
        assert context.find_request_context() is request_context


def test_request_is_visible_in_a_task(merged: None) -> None:
    """A task sees the request, in a context that is not the request's own."""
    app = make_merged()

    def work() -> tuple[object, ...]:
        own = flask.globals._cv_app.get()
        assert own is not pushed
        assert context.find_request_context() is own
        return list(g), request.path, request.args["q"], dict(session)

    with in_request(app):
        pushed = flask.globals._cv_app.get()
        g.who = "request"

        with open_scope():
            found = run(work).result(PATIENCE)

        assert found == ([], "/path", "1", {})
        assert flask.globals._cv_app.get() is pushed
        assert g.who == "request"


def test_request_waits_for_its_tasks(merged: None) -> None:
    """What was started in a request is done when it ends."""
    app = make_late(make_merged())
    done: list[str] = []

    with in_request(app):
        run(done.append, "task")
        assert done == []

    assert done == ["task"]


@pytest.mark.parametrize("fails", [True, False])
def test_end_of_a_task_is_not_the_end_of_the_request(
    merged: None, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A task's end calls teardown_appcontext, in its context, and no other."""
    app = make_merged()
    monkeypatch.setattr(app.logger, "disabled", True)
    events: list[object] = []
    app.teardown_request(lambda exc: events.append("request"))

    @app.teardown_appcontext
    def close(exc: BaseException | None) -> None:
        events.append((g.who, type(exc)))

    def work() -> None:
        g.who = "task"

        if fails:
            raise ValueError

    with in_request(app):
        g.who = "request"

        with open_scope():
            run(work)

        assert events == [("task", ValueError if fails else type(None))]
        app.teardown_appcontext_funcs.remove(close)


@pytest.mark.parametrize("threads", [True, False])
def test_nothing_refers_to_a_context_that_was_used(merged: None, threads: bool) -> None:
    """A task's context goes without the garbage collector (behaviour 10)."""
    app = make_merged() if threads else make_late(make_merged())
    gone = threading.Event()
    references: list[weakref.ref[AppContext]] = []

    def work() -> None:
        context = flask.globals._cv_app.get()
        references.append(weakref.ref(context, lambda _: gone.set()))

    gc.disable()

    try:
        with in_request(app), open_scope():
            run(work)

        assert gone.wait(PATIENCE)
    finally:
        gc.enable()


def test_run_in_what_is_torn_down_last(merged: None) -> None:
    """Once the request was torn down run() is a plain call, though it is visible."""
    app = Flask(__name__)
    threads: list[int] = []

    @app.teardown_appcontext
    def last(exc: BaseException | None) -> None:
        threads.append(run(threading.get_ident).result(0))

    # Its function was registered later, and is called earlier.
    ApiTask(app)

    with in_request(app):
        pass

    assert threads == [threading.get_ident()]


def test_request_is_not_routed_again() -> None:
    """A task does not undo what a url_value_preprocessor did for the view."""
    app = Flask(__name__)
    ApiTask(app)

    @app.url_value_preprocessor
    def take_language(endpoint: str | None, values: dict[str, t.Any] | None) -> None:
        g.language = (values or {}).pop("language")

    @app.before_request
    def start() -> None:
        assert run(request.args.get, "q").result(PATIENCE) == "1"

    @app.get("/<language>/")
    def index() -> str:
        return str(g.language)

    assert app.test_client().get("/en/?q=1").text == "en"


def test_task_without_a_request(merged: None) -> None:
    """Outside of a request a task has a plain app context."""

    def work() -> tuple[str, bool]:
        return flask.current_app.name, has_request_context()

    with make_merged().app_context(), open_scope():
        assert run(work).result(PATIENCE) == (__name__, False)


def test_task_of_another_app(merged: None) -> None:
    """A task of another app's block has that app's context."""
    app = make_merged()
    other = Flask("other")
    ApiTask(other)

    with in_request(app), other.app_context(), open_scope():
        assert run(lambda: flask.current_app.name).result(PATIENCE) == "other"
