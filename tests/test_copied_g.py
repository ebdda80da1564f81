from __future__ import annotations

import contextlib
import re
import sys
import threading
import typing as t

import pytest
from conftest import PATIENCE
from flask import Flask
from flask import g
from flask import request
from flask import url_for
from flask_babel import Babel  # type: ignore[import-untyped]
from flask_babel import force_locale
from flask_babel import get_locale
from flask_babel import get_timezone
from flask_babel import refresh

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask.config import Config
from flask_apitask.executor.pool import ThreadPool

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory


def find(*names: str) -> dict[str, object]:
    """Return what is found on g."""
    return {name: g.get(name, "missing") for name in names}


@pytest.fixture
def hold_tasks(monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[threading.Event]:
    """Have no task begin before the event is set, however quick its thread is."""
    begin = threading.Event()
    work = ThreadPool.work

    def work_late(pool: ThreadPool, worker: t.Any) -> bool:
        begin.wait(PATIENCE)
        return work(pool, worker)

    monkeypatch.setattr(ThreadPool, "work", work_late)
    yield begin
    begin.set()


def test_names_that_a_task_finds(
    make_app: AppFactory, hold_tasks: threading.Event
) -> None:
    """A task finds the named values, as they were at run(), and nothing else."""
    app = make_app(APITASK_COPY_G=("request_id", "lang_code", "unset"))

    with app.test_request_context():
        g.request_id = 1
        g.lang_code = "de"
        g.secret = "no"
        first = run(find, "request_id", "lang_code", "secret", "unset")
        g.request_id = 2
        del g.lang_code
        second = run(find, "request_id", "lang_code")
        g.request_id = 3
        hold_tasks.set()

        assert first.result(PATIENCE) == {
            "request_id": 1,
            "lang_code": "de",
            "secret": "missing",
            "unset": "missing",
        }
        assert second.result(PATIENCE) == {"request_id": 2, "lang_code": "missing"}


def test_what_a_task_puts_there(make_app: AppFactory) -> None:
    """A value that a task sets under such a name is its own."""
    app = make_app(APITASK_COPY_G=["user"])

    def change() -> None:
        g.user = "task"

    with app.test_request_context():
        g.user = "view"
        run(change).result(PATIENCE)
        assert g.user == "view"
        assert run(find, "user").result(PATIENCE) == {"user": "view"}


def test_done_callback(make_app: AppFactory) -> None:
    """A done callback finds what its task found."""
    app = make_app(APITASK_COPY_G="user")
    found: list[object] = []
    called = threading.Event()

    def call_back(future: object) -> None:
        found.append(g.get("user"))
        called.set()

    with app.test_request_context():
        g.user = "ada"
        run(int).add_done_callback(call_back)
        assert called.wait(PATIENCE)

    assert found == ["ada"]


def test_scope_in_a_command_and_in_a_task(make_app: AppFactory) -> None:
    """A block's tasks find it as well, and so do those of a block within a task."""
    app = make_app(APITASK_COPY_G="user")

    def work() -> object:
        with open_scope():
            return run(find, "user").result(PATIENCE)

    with app.app_context():
        g.user = "ada"

        with open_scope() as scope:
            assert run(work).result(PATIENCE) == {"user": "ada"}
            assert scope.submit(find, "user").result(PATIENCE) == {"user": "ada"}


def test_submit_from_a_plain_thread(make_app: AppFactory) -> None:
    """If the caller has no g, the task finds nothing."""
    app = make_app(APITASK_COPY_G="user")
    found: list[object] = []

    with app.app_context(), open_scope() as scope:
        g.user = "ada"
        thread = threading.Thread(
            target=lambda: found.append(scope.submit(find, "user").result(PATIENCE))
        )
        thread.start()
        thread.join(PATIENCE)

    assert found == [{"user": "missing"}]


def test_url_defaults(make_app: AppFactory) -> None:
    """The pattern of Flask's docs for language codes in URLs works in a task."""
    app = make_app(APITASK_COPY_G=("lang_code",))

    @app.url_defaults
    def add_language_code(endpoint: str, values: dict[str, t.Any]) -> None:
        if "lang_code" in values or not g.lang_code:
            return

        if app.url_map.is_endpoint_expecting(endpoint, "lang_code"):
            values["lang_code"] = g.lang_code

    @app.url_value_preprocessor
    def pull_lang_code(endpoint: str | None, values: dict[str, t.Any] | None) -> None:
        g.lang_code = (values or {}).pop("lang_code", None)

    @app.get("/<lang_code>/about")
    def about() -> str:
        return run(url_for, "about").result(PATIENCE)

    assert app.test_client().get("/de/about").text == "/de/about"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ((), ()),
        (["a", "b"], ("a", "b")),
        ("", ()),
        ("a", ("a",)),
        (" a , b_2 ", ("a", "b_2")),
        ('["a", "b"]', ("a", "b")),
    ],
)
def test_good_values(value: object, names: tuple[str, ...]) -> None:
    """The key takes a tuple, a list, and text as an environment variable brings it."""
    assert Config.from_mapping({"APITASK_COPY_G": value}).copy_g == names


@pytest.mark.parametrize(
    "value", [None, 1, True, "a b", "a,", "[a", '["a", 1]', ["a", 1], [""], {"a"}, b"a"]
)
def test_bad_values(value: object) -> None:
    """The error of a bad value names the key, the value and what is allowed."""
    text = (
        f"APITASK_COPY_G is {value!r}, but must be names, as in ('request_id',"
        " 'lang_code')."
    )

    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Config.from_mapping({"APITASK_COPY_G": value})


def test_names_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment variable can name them, as JSON or with commas."""
    monkeypatch.setenv("SHOP_APITASK_COPY_G", '["user", "tenant"]')
    app = Flask(__name__)
    app.config.from_prefixed_env("SHOP")
    ApiTask(app)
    assert app.extensions["apitask"].config.copy_g == ("user", "tenant")


# Flask-Babel


def make_babel_app(make_app: AppFactory) -> Flask:
    """Make an app in which the user's locale and time zone are on g."""
    app = make_app()
    Babel(
        app,
        locale_selector=lambda: (
            g.get("locale") or request.accept_languages.best_match(["en", "de"])
        ),
        timezone_selector=lambda: g.get("timezone"),
    )
    return app


def tell_locale() -> list[str]:
    """Return Flask-Babel's locale and time zone."""
    return [str(get_locale()), str(get_timezone())]


def test_where_flask_babel_keeps_it(make_app: AppFactory) -> None:
    """It is on g, by the name that the package knows."""
    with make_babel_app(make_app).test_request_context():
        get_locale()
        assert list(g) == ["_flask_babel"]


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_locale_of_the_caller(make_app: AppFactory, asked: bool) -> None:
    """A task has the locale and the time zone that the view has, or would have."""
    with make_babel_app(make_app).test_request_context():
        g.locale = "de"
        g.timezone = "Europe/Vienna"
        assert not asked or tell_locale() == ["de", "Europe/Vienna"]
        assert run(tell_locale).result(PATIENCE) == ["de", "Europe/Vienna"]


def test_locale_that_is_set_later(make_app: AppFactory) -> None:
    """Starting a task does not choose the view's locale for it."""
    with make_babel_app(make_app).test_request_context(
        headers={"Accept-Language": "en"}
    ):
        assert run(tell_locale).result(PATIENCE) == ["en", "UTC"]
        assert list(g) == []
        g.locale = "de"
        assert tell_locale() == ["de", "UTC"]


def test_forced_locale(make_app: AppFactory, hold_tasks: threading.Event) -> None:
    """A locale that is forced at run() holds in the task, and only in it."""
    with make_babel_app(make_app).test_request_context(
        headers={"Accept-Language": "en"}
    ):
        before = run(tell_locale)

        with force_locale("fr"):
            forced = run(tell_locale)

        after = run(tell_locale)
        hold_tasks.set()

        assert before.result(PATIENCE) == ["en", "UTC"]
        assert forced.result(PATIENCE) == ["fr", "UTC"]
        assert after.result(PATIENCE) == ["en", "UTC"]


def test_locale_that_a_task_forces(make_app: AppFactory) -> None:
    """A locale that a task forces is not seen by the view, nor by another task."""
    inside = threading.Barrier(3)

    def force(locale: str) -> list[str]:
        with force_locale(locale):
            inside.wait(PATIENCE)
            told = tell_locale()
            inside.wait(PATIENCE)

        refresh()
        return told

    with make_babel_app(make_app).test_request_context(
        headers={"Accept-Language": "en"}
    ):
        get_locale()
        tasks = [run(force, locale) for locale in ("fr", "de")]
        inside.wait(PATIENCE)
        assert tell_locale() == ["en", "UTC"]
        inside.wait(PATIENCE)
        assert [task.result(PATIENCE)[0] for task in tasks] == ["fr", "de"]


def test_locale_after_a_task_has_changed_it(make_app: AppFactory) -> None:
    """A done callback has the locale of the caller, whatever the task has done."""
    told: list[list[str]] = []

    def work() -> None:
        g.locale = "fr"
        refresh()
        tell_locale()

    def call_back(_: object) -> None:
        told.append(tell_locale())
        refresh()

    app = make_babel_app(make_app)

    @app.get("/")
    def index() -> str:
        g.locale = "de"
        future = run(work)
        future.add_done_callback(call_back)
        future.add_done_callback(call_back)
        return "ok"

    app.test_client().get("/")
    assert told == [["de", "UTC"]] * 2


def test_selector_that_fails(make_app: AppFactory) -> None:
    """A selector that fails does not keep a task from being started."""
    with make_babel_app(make_app).app_context(), open_scope():
        # It asks for a request.
        assert run(int).result(PATIENCE) == 0
        assert list(g) == []

        with contextlib.suppress(RuntimeError):
            get_locale()

        assert run(find, "locale").result(PATIENCE) == {"locale": "missing"}


def test_another_library_by_that_name(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another library of the same name, which keeps nothing there, is left alone."""
    monkeypatch.delitem(sys.modules, "flask_babel")
    app = make_app()
    app.extensions["babel"] = object()

    with app.test_request_context():
        assert run(lambda: list(g)).result(PATIENCE) == []
