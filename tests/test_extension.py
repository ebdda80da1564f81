from __future__ import annotations

import sys
import threading
import typing as t

import pytest
from conftest import PATIENCE
from flask import Blueprint
from flask import current_app
from flask import Flask
from late_threads import make_late

import flask_apitask
from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import extension
from flask_apitask import run
from flask_apitask.threads import Threads

if t.TYPE_CHECKING:
    from conftest import AppFactory


def test_init_app_registers_the_extension() -> None:
    """An app set up by the constructor or by init_app has its state and its hooks."""
    direct = Flask(__name__)
    ApiTask(direct)
    later = Flask(__name__)
    ApiTask().init_app(later)

    for app in (direct, later):
        assert app.extensions["apitask"].config.enabled
        assert "do_teardown_request" in vars(app)
        assert not app.teardown_request_funcs
        assert not app.teardown_appcontext_funcs


def test_constructor_without_an_app_touches_none() -> None:
    """ApiTask() alone does nothing."""
    assert vars(ApiTask()) == {}


@pytest.mark.parametrize("same", [True, False])
def test_second_one_is_refused(same: bool) -> None:
    """A second ApiTask on an app, or a second init_app, is an error that says so."""
    app = Flask(__name__)
    first = ApiTask(app)
    state = app.extensions["apitask"]
    teardown = app.do_teardown_request
    second = first if same else ApiTask()

    with pytest.raises(RuntimeError) as excinfo:
        second.init_app(app)

    assert str(excinfo.value) == (
        "An 'ApiTask' instance has already been registered on this Flask app."
        " One is enough: run() and the others find it by the current app."
    )
    assert app.extensions["apitask"] is state
    assert app.do_teardown_request is teardown


def test_current_app_is_the_app() -> None:
    """The proxy stands for the app, as it does everywhere."""
    app = Flask(__name__)

    with app.app_context():
        ApiTask(current_app)

    assert "apitask" in app.extensions


def test_app_that_serves_already() -> None:
    """A scope that is opened at once has its end."""
    app = Flask(__name__)
    done: list[str] = []

    @app.get("/")
    def index() -> str:
        if "apitask" not in app.extensions:
            ApiTask(app)
            make_late(app)

        run(done.append, "task")
        return "ok"

    app.test_client().get("/")
    assert done == ["task"]


def test_request_while_the_app_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its answer, though nothing is there yet that others count on."""
    app = Flask(__name__)
    app.config["APITASK_WAIT"] = "close"
    statuses: list[int] = []

    class RequestingThreads(Threads):
        def __init__(self, size: int) -> None:
            statuses.append(app.test_client().get("/missing").status_code)
            super().__init__(size)

    monkeypatch.setattr(extension, "Threads", RequestingThreads)
    ApiTask(app)
    assert statuses == [404]


def test_one_extension_sets_up_several_apps() -> None:
    """An ApiTask holds no app: one sets up as many as there are."""
    apitask = ApiTask()
    apps = [Flask(__name__), Flask(__name__)]

    for app in apps:
        apitask.init_app(app)

    assert apps[0].extensions["apitask"] is not apps[1].extensions["apitask"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("APITASK_ENABLED", "perhaps"),
        ("APITASK_MAX_WORKERS", 0),
        ("APITASK_POOL_SIZE", 2.5),
        ("APITASK_TIMEOUT", -1),
        ("APITASK_MAIL_BACKGROUND", 7),
    ],
)
def test_bad_value_is_refused(key: str, value: object) -> None:
    """A bad value raises in init_app, with its key, and leaves the app untouched."""
    app = Flask(__name__)
    app.config[key] = value

    with pytest.raises(ValueError, match=rf"^{key} is {value!r}, but must be "):
        ApiTask(app)

    assert "apitask" not in app.extensions
    assert "do_teardown_request" not in vars(app)


def test_prefixed_environment_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values from from_prefixed_env() work."""
    monkeypatch.setenv("FLASK_APITASK_MAX_WORKERS", "3")
    monkeypatch.setenv("FLASK_APITASK_TIMEOUT", "2.5")
    monkeypatch.setenv("FLASK_APITASK_ENABLED", "false")
    app = Flask(__name__)
    app.config.from_prefixed_env()
    ApiTask(app)
    config = app.extensions["apitask"].config

    assert (config.max_workers, config.timeout, config.enabled) == (3, 2.5, False)


def test_config_is_read_once(make_app: AppFactory) -> None:
    """A value that is changed after init_app has no effect."""
    app = make_app(APITASK_MAX_WORKERS=2)
    app.config["APITASK_MAX_WORKERS"] = 5

    with app.test_request_context():
        run(str).result(PATIENCE)
        assert "max_workers=2>" in repr(current_scope())


def test_mail_without_flask_mail_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The flag for mail without Flask-Mail is an error with the remedy."""
    monkeypatch.setitem(sys.modules, "flask_mail", None)

    for name in [name for name in sys.modules if "flask_apitask.mail" in name]:
        monkeypatch.delitem(sys.modules, name)

    monkeypatch.delattr(flask_apitask, "mail", raising=False)
    app = Flask(__name__)
    app.config["APITASK_MAIL_BACKGROUND"] = True

    with pytest.raises(RuntimeError) as excinfo:
        ApiTask(app)

    assert str(excinfo.value) == (
        "APITASK_MAIL_BACKGROUND is on, but Flask-Mail is not installed. Install"
        ' it with: pip install "flask-apitask[mail]"'
    )
    assert "apitask" not in app.extensions


def test_other_import_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that fails for another reason than Flask-Mail is told as it is."""
    for name in [name for name in sys.modules if "flask_apitask.mail" in name]:
        monkeypatch.delitem(sys.modules, name)

    monkeypatch.delattr(flask_apitask, "mail", raising=False)
    monkeypatch.setitem(sys.modules, "smtplib", None)
    monkeypatch.setitem(sys.modules, "flask_apitask.mail", None)
    app = Flask(__name__)
    app.config["APITASK_MAIL_BACKGROUND"] = True

    with pytest.raises(ImportError) as excinfo:
        ApiTask(app)

    assert excinfo.value.name == "flask_apitask.mail"


def test_request_without_a_task_starts_no_thread(make_app: AppFactory) -> None:
    """A request that runs no task starts no thread (behaviour 1)."""
    app = make_app()
    app.add_url_rule("/", "index", lambda: "ok")
    before = threading.enumerate()

    assert app.test_client().get("/").status_code == 200
    assert threading.enumerate() == before


def test_disabled_run_is_a_plain_call(make_app: AppFactory) -> None:
    """With APITASK_ENABLED off there is no scope, and an exception goes to the view."""
    app = make_app(APITASK_ENABLED=False)
    seen: list[object] = []

    @app.get("/")
    def index() -> str:
        seen.append(current_scope())
        seen.append(run(threading.get_ident).result(0))

        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0)

        return "ok"

    assert app.test_client().get("/").status_code == 200
    assert seen == [None, threading.get_ident()]


def test_blueprint_and_library_code_find_the_scope(make_app: AppFactory) -> None:
    """run() works in a blueprint, without the ApiTask object (behaviour 2)."""
    app = make_late(make_app())
    blueprint = Blueprint("site", __name__)
    done: list[str] = []

    @blueprint.get("/")
    def index() -> str:
        run(done.append, "task")
        return "ok"

    app.register_blueprint(blueprint)
    app.test_client().get("/")

    assert done == ["task"]


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


def test_without_any_context_run_is_a_plain_call() -> None:
    """Outside of any app, run() calls the task, and what it raises goes on."""
    assert run(threading.get_ident).result(0) == threading.get_ident()

    with pytest.raises(ZeroDivisionError):
        run(divmod, 1, 0)


def test_in_an_app_context_run_is_a_plain_call(make_app: AppFactory) -> None:
    """In an app context without a scope, run() calls the task in that very context."""
    app = make_app()

    with app.app_context():
        assert run(threading.get_ident).result(0) == threading.get_ident()

        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0)


def test_on_an_app_without_the_extension_run_is_a_plain_call() -> None:
    """In a request of an app that has no ApiTask, run() calls the task."""
    app = Flask(__name__)

    with app.test_request_context():
        assert run(threading.get_ident).result(0) == threading.get_ident()
        assert current_scope() is None


@pytest.mark.parametrize("not_a_task", [None, 5, "fn", object()])
@pytest.mark.parametrize("in_request", [True, False])
def test_what_can_not_be_called_is_refused(
    make_app: AppFactory, not_a_task: t.Any, in_request: bool
) -> None:
    """What is no task raises a TypeError where run() was called, with the remedy."""
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
