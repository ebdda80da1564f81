from __future__ import annotations

import contextlib
import copy
import sys
import threading
import types
import typing as t
from unittest import mock

import flask_mail
import pytest
from conftest import PATIENCE
from flask import Blueprint
from flask import current_app
from flask import Flask
from flask import g
from flask import has_app_context
from late_threads import make_late

import flask_apitask
from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import request_scope
from flask_apitask import run
from flask_apitask import wait
from flask_apitask.context import MERGED
from flask_apitask.executor.pool import ThreadPool

if t.TYPE_CHECKING:
    import pathlib

    from conftest import AppFactory


# What Flask keeps of an app: functions that are called by name of a blueprint, or not.
HOOKS = [
    "after_request_funcs",
    "before_request_funcs",
    "teardown_appcontext_funcs",
    "teardown_request_funcs",
    "url_value_preprocessors",
]


def hooks_of(app: Flask) -> dict[str, t.Any]:
    """Return a copy of the functions that an app has registered."""
    return {name: copy.deepcopy(getattr(app, name)) for name in HOOKS}


@pytest.mark.parametrize("enabled", [True, False])
def test_hooks(enabled: bool) -> None:
    """An app has Flask's own hooks, its state, and nothing else of it is touched.

    Without a scope for each request, nothing is made when a request begins.
    """
    apitask = ApiTask()
    assert vars(apitask) == {}
    before = vars(Flask(__name__))
    states = []

    for _ in range(2):
        app = Flask(__name__)
        app.config["APITASK_ENABLED"] = enabled
        touched = hooks_of(app)
        apitask.init_app(app)
        begin = [request_scope.begin_request]
        touched["before_request_funcs"] = {None: begin} if enabled else {}
        touched["teardown_request_funcs"] = {None: [request_scope.end_request]}

        # Before Flask 3.2, one that raises keeps the others from being called.
        if not MERGED:
            touched["teardown_appcontext_funcs"] = [request_scope.end_leftovers]

        assert hooks_of(app) == touched
        assert vars(app).keys() == before.keys()
        assert list(app.extensions) == ["apitask"]
        states.append(app.extensions["apitask"])

    assert states[0] is not states[1]
    assert states[0].config.enabled is enabled


@pytest.mark.parametrize("same", [True, False])
def test_second_one_is_refused(same: bool) -> None:
    """A second ApiTask on an app, or a second init_app, is an error that says so."""
    app = Flask(__name__)
    first = ApiTask(app)
    state, hooks = app.extensions["apitask"], hooks_of(app)
    second = first if same else ApiTask()

    with pytest.raises(RuntimeError) as excinfo:
        second.init_app(app)

    assert str(excinfo.value) == (
        "An 'ApiTask' instance has already been registered on this Flask app."
        " One is enough: run() and the other functions use the current app's."
    )
    assert app.extensions["apitask"] is state
    assert hooks_of(app) == hooks


@pytest.mark.parametrize("background", [False, True])
def test_app_that_serves_already(
    monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """Flask then refuses the hooks, and nothing in the app has been changed."""
    monkeypatch.setattr(flask_mail, "Connection", flask_mail.Connection)
    app = Flask(__name__)
    app.config["APITASK_MAIL_BACKGROUND"] = background
    app.test_client().get("/")
    before, connection = hooks_of(app), flask_mail.Connection

    with pytest.raises(AssertionError, match="can no longer be called"):
        ApiTask(app)

    assert app.extensions == {}
    assert hooks_of(app) == before
    assert flask_mail.Connection is connection


def test_request_while_the_app_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is answered, even though the set-up is not complete."""
    app = Flask(__name__)
    app.config["APITASK_WAIT"] = "close"
    done: list[int] = []

    @app.before_request
    def start() -> None:
        run(done.append, 1)

    class RequestingPool(ThreadPool):
        def __init__(self, size: int) -> None:
            done.append(app.test_client().get("/missing").status_code)
            super().__init__(size)

    monkeypatch.setattr("flask_apitask.extension.ThreadPool", RequestingPool)
    ApiTask(app)
    assert done == [1, 404]


def test_bad_value_is_refused() -> None:
    """A bad value raises in init_app, with its key, and leaves the app untouched."""
    app = Flask(__name__)
    before = hooks_of(app)
    app.config["APITASK_MAX_WORKERS"] = 0

    with pytest.raises(ValueError, match=r"^APITASK_MAX_WORKERS is 0, but must be "):
        ApiTask(app)

    assert app.extensions == {}
    assert hooks_of(app) == before


def forget_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next app import our modules for mail again."""
    for name in [name for name in sys.modules if "flask_apitask.mail" in name]:
        monkeypatch.delitem(sys.modules, name)

    monkeypatch.delattr(flask_apitask, "mail", raising=False)


@pytest.mark.parametrize(
    "stub",
    [mock.MagicMock(), mock.Mock(spec=["Mail", "__spec__"]), types.ModuleType("stub")],
)
@pytest.mark.parametrize(
    ("stubbed", "missing"),
    [("flask_mail", "flask_mailman"), ("flask_mailman", "flask_mail")],
)
def test_a_stub_in_place_of_a_mail_library(
    monkeypatch: pytest.MonkeyPatch,
    make_app: AppFactory,
    stub: t.Any,
    stubbed: str,
    missing: str,
) -> None:
    """A test suite may put one into ``sys.modules``; the app starts, and it sends."""
    forget_mail(monkeypatch)
    stub.Mail = mock.Mock()
    monkeypatch.setitem(sys.modules, stubbed, stub)
    monkeypatch.setitem(sys.modules, missing, None)
    app = make_app(APITASK_MAIL_BACKGROUND=True)
    mail = stub.Mail(app)

    with app.test_request_context():
        mail.send("hello")

    mail.send.assert_called_once_with("hello")


@pytest.mark.parametrize(
    ("content", "error"),
    [("import nowhere", ModuleNotFoundError), ("Attachment = 1", ImportError)],
    ids=["it can't be imported", "it lacks what we need"],
)
def test_a_mail_library_that_is_broken(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    content: str,
    error: type[Exception],
) -> None:
    """What is wrong with it is told as it is."""
    (tmp_path / "flask_mail.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    forget_mail(monkeypatch)

    for name in ("flask_mail", "flask_mailman"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    app = Flask(__name__)
    app.config["APITASK_MAIL_BACKGROUND"] = True

    with pytest.raises(error):
        ApiTask(app)


@pytest.mark.parametrize("missing", ["flask_mail flask_mailman", "flask_apitask.mail"])
def test_mail_that_can_not_be_imported(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The flag for mail without a library is an error with the remedy.

    An import that fails for another reason is told as it is.
    """
    forget_mail(monkeypatch)

    for name in missing.split():
        monkeypatch.setitem(sys.modules, name, None)

    app = Flask(__name__)
    app.config["APITASK_MAIL_BACKGROUND"] = True

    with pytest.raises((RuntimeError, ImportError)) as excinfo:
        ApiTask(app)

    if " " in missing:
        assert str(excinfo.value) == (
            "APITASK_MAIL_BACKGROUND is on, but neither Flask-Mail nor Flask-Mailman is"
            ' installed. Install one of them: pip install "flask-apitask[mail]" or pip'
            ' install "flask-apitask[mailman]"'
        )
    else:
        assert isinstance(excinfo.value, ImportError)
        assert excinfo.value.name == missing

    assert app.extensions == {}


@pytest.mark.parametrize("where", ["nowhere", "app", "disabled", "no extension"])
def test_run_is_a_plain_call(make_app: AppFactory, where: str) -> None:
    """Where there is no scope run() calls the task, and what it raises goes on.

    That is outside of any app, in an app context, with ``APITASK_ENABLED`` off, and in
    a request of an app that has no ApiTask. A done callback is called there, too.
    """
    app = Flask(__name__) if where == "no extension" else make_app()
    called: list[t.Any] = []

    if where == "disabled":
        app = make_app(APITASK_ENABLED=False)

    def note(future: object) -> None:
        called.extend([future, threading.get_ident(), has_app_context() and g.who])

    with contextlib.ExitStack() as stack:
        if where == "app":
            stack.enter_context(app.app_context())
        elif where != "nowhere":
            stack.enter_context(app.test_request_context())

        if where != "nowhere":
            g.who = "caller"

        assert current_scope() is None
        wait(0.0)
        future = run(threading.get_ident)
        assert future.result(0) == threading.get_ident()
        future.add_done_callback(note)
        who = where != "nowhere" and "caller"
        assert called[1] == threading.get_ident()
        assert called == [future, called[1], who]

        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0)


def test_blueprint_and_library_code_find_the_scope(make_app: AppFactory) -> None:
    """run() works in a blueprint, without the ApiTask object, any number of times."""
    app = make_late(make_app(APITASK_MAX_WORKERS=2))
    app.config["APITASK_MAX_WORKERS"] = 5
    blueprint = Blueprint("site", __name__)
    done: list[str] = []

    @blueprint.get("/")
    def index() -> str:
        run(done.append, "task")
        # As it was when the app was set up.
        return repr(current_scope())

    app.register_blueprint(blueprint)
    assert "max_workers=2>" in app.test_client().get("/").text
    assert done == ["task"]


def test_current_app_is_the_app() -> None:
    """The proxy stands for the app, as it does everywhere."""
    app = Flask(__name__)

    with app.app_context():
        ApiTask(current_app)

    assert "apitask" in app.extensions


def test_request_without_a_task_starts_no_thread(make_app: AppFactory) -> None:
    """A request that runs no task starts no thread (behaviour 1)."""
    app = make_app()
    app.add_url_rule("/", "index", lambda: "ok")
    before = threading.enumerate()

    assert app.test_client().get("/").status_code == 200
    assert threading.enumerate() == before


def test_arguments_belong_to_the_task(make_app: AppFactory) -> None:
    """Every argument after the task is the task's, whatever its name."""
    app = make_app()

    def collect(*args: object, **kwargs: object) -> object:
        return args, kwargs

    with app.test_request_context():
        future = run(collect, 1, 2, task=3, self=4, timeout=5, fn=6)
        assert future.result(PATIENCE) == (
            (1, 2),
            {"task": 3, "self": 4, "timeout": 5, "fn": 6},
        )


@pytest.mark.parametrize("not_a_task", [None, 5, "fn", object()])
@pytest.mark.parametrize("in_request", [True, False])
def test_what_can_not_be_called_is_refused(
    make_app: AppFactory, not_a_task: t.Any, in_request: bool
) -> None:
    """Anything but a task is a TypeError where run() was called, with the remedy."""
    app = make_app()
    context = app.test_request_context() if in_request else app.app_context()

    with context, pytest.raises(TypeError, match=r"run\(fn, x\), not run\(fn\(x\)\)"):
        run(not_a_task)


def test_coroutine_instead_of_a_function_is_refused(make_app: AppFactory) -> None:
    """run(fn()) with an async fn is a TypeError, as the coroutine is no callable."""
    app = make_app()

    async def work() -> None:
        pass

    coroutine = work()

    with app.test_request_context(), pytest.raises(TypeError, match="A task is a call"):
        run(coroutine)  # type: ignore[call-overload]

    coroutine.close()
