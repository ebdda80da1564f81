from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import queue
import threading
import typing as t
import weakref

import pytest
from conftest import PATIENCE
from flask import flash
from flask import Flask
from flask import request_started
from flask import session
from flask.sessions import SecureCookieSession
from flask.sessions import SecureCookieSessionInterface
from flask.sessions import SessionInterface
from flask.sessions import SessionMixin
from flask_login import current_user  # type: ignore[import-untyped]
from flask_login import login_user
from flask_login import LoginManager
from flask_login import UserMixin
from werkzeug.datastructures import CallbackDict

from flask_apitask import ApiTask
from flask_apitask import extension
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import scoped
from flask_apitask import task
from flask_apitask import task_finished
from flask_apitask import wait
from flask_apitask.api import warn_without_apitask
from flask_apitask.context import MERGED

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory
    from flask import Request

WITHOUT = (
    "run() was called in a request of 'shop', which has no ApiTask, so nothing ran in"
    " the background. Create one with ApiTask(app), or call its init_app(app)."
)


def find_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the texts of the log, which has nothing above a warning."""
    assert all(record.levelno <= logging.WARNING for record in caplog.records)
    return caplog.messages


# An app without ApiTask


def test_run_without_apitask(caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING of the app says that run() is a plain call in its requests."""
    app = Flask("shop")

    @app.get("/")
    def index() -> str:
        run(int)
        return str(run(threading.get_ident).result() == threading.get_ident())

    assert app.test_client().get("/").text == "True"
    assert app.test_client().get("/").text == "True"
    assert find_warnings(caplog) == [WITHOUT]
    assert caplog.records[0].name == "shop"


def test_run_outside_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    """Where a plain call is what was asked for, nothing warns."""
    run(int)

    with Flask("shop").app_context():
        run(int)

    app = Flask("shop")
    app.config["APITASK_ENABLED"] = False
    ApiTask(app)

    with app.test_request_context():
        run(int)
        wait()

    # In the request of one app, the code of another one.
    with app.test_request_context(), Flask("other").app_context():
        run(int)

    assert find_warnings(caplog) == []


def test_apitask_that_comes_late(caplog: pytest.LogCaptureFixture) -> None:
    """After the warning, the app can still be set up."""
    app = Flask("shop")

    with app.test_request_context():
        run(int)

    ApiTask(app)

    with app.test_request_context():
        assert run(threading.get_ident).result(PATIENCE) != threading.get_ident()

    assert find_warnings(caplog) == [WITHOUT]


def serve_with_flag(name: str, flag: object) -> None:
    """Let an app without ApiTask serve two requests."""
    app = Flask(name)
    app.config["APITASK_MAIL_BACKGROUND"] = flag

    for _ in range(2):
        app.test_client().get("/")


def test_apitask_that_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    """As long as no app has an ApiTask, one WARNING says that mail is not rerouted."""
    # An earlier test may have created one.
    request_started.connect(extension._warn_of_missing)
    ApiTask()
    serve_with_flag("shop", "true")
    serve_with_flag("off", "no")
    serve_with_flag("unset", None)
    # From here on, requests don't pay for the check.
    ApiTask(Flask("last"))
    serve_with_flag("late", "true")
    what = "APITASK_MAIL_BACKGROUND was on"
    assert find_warnings(caplog) == [WITHOUT.replace("run() was called", what)]


def test_warning_of_other_work(caplog: pytest.LogCaptureFixture) -> None:
    """The warning can name other work too."""
    app = Flask("shop")
    warn_without_apitask(app, "Mail was sent")

    with app.test_request_context():
        warn_without_apitask(app, "Mail was sent")

    expected = WITHOUT.replace("run() was called", "Mail was sent")
    assert find_warnings(caplog) == [expected]


# Keys


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("APITASK_TIMOUT", "Did you mean APITASK_TIMEOUT?"),
        ("APITASK_WORKERS", "Did you mean APITASK_MAX_WORKERS?"),
        ("APITASK_MAIL_BACKGROND", "Did you mean APITASK_MAIL_BACKGROUND?"),
        ("APITASK_timeout", "Did you mean APITASK_TIMEOUT?"),
        ("APITASK_MAIL_SERVER", "Did you mean MAIL_SERVER?"),
        ("APITASK_MAIL_PASWORD", "Did you mean MAIL_PASSWORD?"),
        ("APITASK_COLOUR", "It has no effect."),
    ],
)
def test_unknown_key(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, key: str, hint: str
) -> None:
    """An unknown key is a WARNING at the start, with a suggestion."""
    make_app(**{key: 5, "APITASK_ENABLED": True, "APITASK": 1, "MY_APITASK_X": 2})
    assert find_warnings(caplog) == [f"Unknown configuration key {key}. {hint}"]


@pytest.mark.parametrize(
    ("keys", "warned"),
    [({}, True), ({"APITASK_MAIL_BACKGROUND": False}, False)],
    ids=["forgotten", "off"],
)
def test_key_that_needs_another(
    caplog: pytest.LogCaptureFixture, keys: dict[str, t.Any], warned: bool
) -> None:
    """A key for background mail alone is a WARNING: it does not turn that on."""
    app = Flask("shop")
    app.config.update(APITASK_MAIL_START="success", **keys)
    ApiTask(app)
    needed = "APITASK_MAIL_BACKGROUND = True"
    expected = f"APITASK_MAIL_START has no effect without {needed}."
    assert find_warnings(caplog) == [expected] * warned


def test_key_that_comes_late(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that is set after ApiTask(app) is a WARNING in the first request."""
    app = make_app(APITASK_TIMEOUT=5, APITASK_COPY_G=["a"], APITASK_ENABLED=False)
    app.add_url_rule("/", view_func=str)
    # These are what they were.
    app.config.update(
        APITASK_TIMEOUT="5.0", APITASK_COPY_G="a", APITASK_WAIT="teardown"
    )
    app.config.update(APITASK_MAIL_BACKGROUND=True, APITASK_POOL_SIZE="many")
    del app.config["APITASK_ENABLED"]
    assert find_warnings(caplog) == []
    other = make_app()
    app.test_client().get("/")
    app.test_client().get("/")
    late = ["APITASK_ENABLED", "APITASK_POOL_SIZE", "APITASK_MAIL_BACKGROUND"]
    text = "was changed after ApiTask(app) had read it, which has no effect."
    assert find_warnings(caplog) == [
        f"{key} {text} Set it before ApiTask(app)." for key in late
    ]
    assert request_started.receivers
    other.test_client().get("/")
    assert len(find_warnings(caplog)) == 3


def test_unknown_key_that_comes_late(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown key is a WARNING then, too, and only once."""
    app = make_app(APITASK_WORKERS=5)
    app.config["APITASK_TIMOUT"] = 5
    app.test_client().get("/")
    text = "Unknown configuration key {}. Did you mean {}?"
    assert find_warnings(caplog) == [
        text.format("APITASK_WORKERS", "APITASK_MAX_WORKERS"),
        text.format("APITASK_TIMOUT", "APITASK_TIMEOUT"),
    ]


def test_key_in_time_costs_nothing(
    make_app: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all apps have served, no request looks for late keys."""
    # Apps of other tests may never serve.
    monkeypatch.setattr(extension, "_unserved", weakref.WeakSet())
    apps = [make_app(), make_app()]
    before = len(request_started.receivers)

    for app in apps:
        app.test_client().get("/")

    assert len(request_started.receivers) == before - 1


# The session


def set_colour(colour: str) -> None:
    """Write to the session."""
    session["colour"] = colour


def count_up() -> int:
    """Change a list in the session."""
    session["counts"].append(len(session["counts"]))
    session.modified = True
    return len(session["counts"])


DROPPED = (
    "Task 'test_silent_mistakes.set_colour' of POST / changed the session (colour). The"
    " change was dropped, because the response may already have its cookie. Change the"
    " session in the view."
)


def test_session_that_a_task_changes(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """What a task writes never gets into the cookie, early or late: one WARNING."""
    app = make_app(SECRET_KEY="test")
    cookies: list[str | None] = []
    saved = threading.Event()

    def write_late(colour: str) -> None:
        assert saved.wait(PATIENCE)
        set_colour(colour)

    # It comes before the wait, and after the cookie was made.
    app.teardown_request(lambda error: saved.set())

    @app.post("/")
    def early() -> str:
        run(set_colour, "red").result(PATIENCE)
        return str(session.get("colour"))

    @app.get("/")
    def late() -> str:
        saved.clear()
        run(write_late, "red")
        return ""

    for number in range(200):
        response = app.test_client().open(method=("POST", "GET")[number % 2])
        assert response.text == ("None", "")[number % 2]
        cookies.append(response.headers.get("Set-Cookie"))

    assert cookies == [None] * 200
    assert find_warnings(caplog) == [DROPPED]


def rows() -> cabc.Iterator[int]:
    """Be called for nothing."""
    yield 1


async def async_rows() -> cabc.AsyncIterator[int]:
    """Be called for nothing."""
    yield 1


@pytest.mark.parametrize("how", ["task", "observed", "inline"])
@pytest.mark.parametrize("task", [rows, async_rows, functools.partial(rows)])
def test_generator_function(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    task: t.Any,
    how: str,
) -> None:
    """A WARNING says, once, that its body has not run; its result is the generator."""
    app = make_app()
    kinds: list[str] = []
    name = getattr(task, "func", task).__name__

    def observe(sender: object, **fields: object) -> None:
        pass

    if how == "observed":
        task_finished.connect(observe, app)

    @app.post("/export")
    def export() -> str:
        if how == "inline":
            run(lambda: run(task).result(PATIENCE)).result(PATIENCE)
        else:
            kinds.append(type(run(task).result(PATIENCE)).__name__)

        return ""

    for _ in range(2):
        assert app.test_client().post("/export").status_code == 200

    kind = "async_generator" if task is async_rows else "generator"
    assert kinds == ([] if how == "inline" else [kind] * 2)
    assert find_warnings(caplog) == [
        f"Task 'test_silent_mistakes.{name}' of POST /export is a generator function,"
        " so its body has not run. Start a function that iterates over it."
    ]


def test_function_that_returns_a_generator(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """It has run, and its caller may iterate over what it returns."""
    app = make_app()

    @app.get("/")
    def page() -> str:
        return str(list(run(lambda: (number for number in range(2))).result(PATIENCE)))

    assert app.test_client().get("/").text == "[0, 1]"
    assert find_warnings(caplog) == []


def test_session_that_a_task_reads(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task reads what the view has set, and what the view sets is in the cookie."""
    app = make_app(SECRET_KEY="test")

    @app.get("/<colour>")
    def index(colour: str) -> str:
        before = session.get("colour", "none")
        session["colour"] = colour
        found = run(lambda: session["colour"]).result(PATIENCE)
        return f"{before} {found}"

    client = app.test_client()
    assert client.get("/red").text == "none red"
    assert client.get("/blue").text == "red blue"
    assert find_warnings(caplog) == []


def test_vary_header(make_app: AppFactory) -> None:
    """A response that depends on the session by way of a task says so to caches."""
    app = make_app(SECRET_KEY="test")

    @app.get("/")
    def index() -> str:
        return str(run(lambda: session.get("colour")).result(PATIENCE))

    assert app.test_client().get("/").headers["Vary"] == "Cookie"


def test_tasks_do_not_share_it(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither another task nor the view sees what a task changes, at any depth."""
    app = make_app(SECRET_KEY="test")

    def nested() -> list[int]:
        first = count_up()

        with open_scope():
            inner = run(count_up).result(PATIENCE)

        return [first, inner, count_up()]

    with app.test_request_context():
        session["counts"] = []
        assert run(nested).result(PATIENCE) == [1, 1, 2]
        assert run(count_up).result(PATIENCE) == 1
        assert session["counts"] == []
        counted: queue.SimpleQueue[int] = queue.SimpleQueue()
        run(int).add_done_callback(lambda future: counted.put(count_up()))
        assert counted.get(timeout=PATIENCE) == 1
        assert session["counts"] == []


def test_flash_in_a_task(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """What a task flashes is dropped, with a WARNING; what the view flashes is not."""
    app = make_app(SECRET_KEY="test")

    @app.get("/")
    def index() -> str:
        flash("from the view")
        run(flash, "from a task").result(PATIENCE)
        return str([message for _, message in session["_flashes"]])

    assert app.test_client().get("/").text == "['from the view']"
    assert [text[:45] for text in find_warnings(caplog)] == [
        "Task 'flask.helpers.flash' of GET / changed t"
    ]


class User(UserMixin):  # type: ignore[misc]
    id = "ada"


# Flask-Login 0.6.3 calls datetime.utcnow(), which Python 3.12 deprecates.
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
@pytest.mark.parametrize("protection", ["basic", "strong", None])
def test_flask_login(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, protection: str | None
) -> None:
    """In a task current_user is the user of the request, by session or by cookie."""
    app = make_app(SECRET_KEY="test")
    manager = LoginManager(app)
    manager.session_protection = protection
    manager.user_loader(lambda user_id: User() if user_id == "ada" else None)

    def tell() -> str | None:
        return getattr(current_user, "id", None)

    @app.post("/")
    def login() -> str:
        login_user(User(), remember=True)
        return str(run(tell).result(PATIENCE))

    @app.get("/")
    def index() -> str:
        return str([run(tell).result(PATIENCE), tell()])

    client = app.test_client()
    assert client.get("/").text == "[None, None]"
    assert client.post("/").text == "ada"
    assert client.get("/").text == "['ada', 'ada']"
    assert find_warnings(caplog) == []
    client.delete_cookie("session")
    assert client.get("/").text == "['ada', 'ada']"
    # Flask-Login notes in the session that it has found the user by the cookie.
    assert len(find_warnings(caplog)) == 1


class Opaque:
    """A value that equals none of its copies."""


class Vexed:
    """A value that can't be compared."""

    def __eq__(self, other: object) -> bool:
        raise ArithmeticError

    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass
class Box:
    """A value that is compared by its contents."""

    content: object


ODD: dict[str, cabc.Callable[[], object]] = {
    "lock": threading.Lock,
    "opaque": Opaque,
    "vexed": Vexed,
    "lock inside": lambda: [1, {"lock": threading.Lock()}],
    "opaque inside": lambda: [Opaque()],
    "box": lambda: Box(Opaque()),
    "nan": lambda: float("nan"),
    "generator": lambda: {"left": (item for item in "ab")},
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("change", ["none", "same", "other", "gone", "beside"])
def test_session_with_odd_values(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    change: str,
) -> None:
    """A value that can't be copied or compared fails no task, and is no change."""
    app, make = make_app(SECRET_KEY="test"), ODD[kind]

    def look() -> type:
        kind = type(session["odd"])

        if change == "same":
            session["odd"] = session["odd"]
        elif change == "other":
            session["odd"] = make()
        elif change == "gone":
            del session["odd"]
        elif change == "beside":
            session["colour"] = "red"

        return kind

    with app.test_request_context():
        session["odd"], session["list"] = make(), [1]
        assert run(look).result(PATIENCE) is type(session["odd"])
        assert "colour" not in session

    changed = {"other": "(odd)", "gone": "(odd)", "beside": "(colour)"}.get(change)
    warnings = find_warnings(caplog)
    assert len(warnings) == (changed is not None)
    assert all(str(changed) in warning for warning in warnings)


def test_failing_task_with_odd_values(make_app: AppFactory) -> None:
    """What a task raises reaches the future, whatever is in the session."""
    app = make_app(SECRET_KEY="test")

    def fail() -> None:
        session["odd"] = Vexed()
        raise LookupError

    with app.test_request_context():
        session["odd"] = Vexed()
        assert isinstance(run(fail).exception(PATIENCE), LookupError)


class StoredSession(CallbackDict[str, t.Any], SessionMixin):
    """A session as Flask-Session has it: a dictionary that knows its place."""

    def __init__(self, initial: dict[str, t.Any], sid: str) -> None:
        super().__init__(initial, lambda self: setattr(self, "modified", True))
        self.sid = sid
        self.modified = False

    def __bool__(self) -> bool:
        return bool(dict(self)) and self.keys() != {"_permanent"}


def test_session_in_a_store(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A session whose class needs arguments is copied, with what is noted on it."""
    app = make_app()
    saved: list[tuple[bool, dict[str, t.Any]]] = []

    class Interface(SessionInterface):
        def open_session(self, app: Flask, request: Request) -> StoredSession:
            return StoredSession({"counts": [1], "odd": Opaque()}, "s3cret")

        def save_session(self, app: Flask, session: t.Any, response: object) -> None:
            saved.append((session.modified, dict(session)))

    app.session_interface = Interface()

    def look() -> str:
        assert not session.modified
        return str(session.sid)  # type: ignore[attr-defined]

    @app.post("/<name>")
    def index(name: str) -> str:
        return str(run({"look": look, "count": count_up}[name]).result(PATIENCE))

    client = app.test_client()
    assert client.post("/look").text == "s3cret"
    assert find_warnings(caplog) == []
    assert client.post("/count").text == "2"
    assert len(find_warnings(caplog)) == 1
    assert [(modified, kept["counts"]) for modified, kept in saved] == [
        (False, [1])
    ] * 2


class PlainSession(dict[str, t.Any]):
    """A mapping that knows nothing of changes, as a session of the app's own may be."""

    new = modified = permanent = accessed = False


class Wrapped:
    """A session that is no dictionary."""

    accessed = False

    def __init__(self, holder: dict[str, t.Any]) -> None:
        self.holder = holder

    def __setitem__(self, key: str, value: object) -> None:
        self.holder[key] = value

    def get(self, key: str) -> object:
        return self.holder.get(key)


@pytest.mark.parametrize("kind", ["dict", "other"])
def test_session_of_the_apps_own(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A session interface of the app's own works; only a dictionary can be copied."""
    app = make_app(SECRET_KEY="test")
    holder = PlainSession()

    class Interface(SecureCookieSessionInterface):
        def open_session(self, app: Flask, request: Request) -> t.Any:
            return holder if kind == "dict" else Wrapped(holder)

        def save_session(self, app: Flask, session: t.Any, response: object) -> None:
            pass

    app.session_interface = Interface()

    with app.test_request_context():
        run(set_colour, "red").result(PATIENCE)
        assert session.get("colour") == (None if kind == "dict" else "red")

    assert len(find_warnings(caplog)) == (1 if kind == "dict" else 0)


@pytest.mark.skipif(MERGED, reason="Flask 3.2 has no context that it can be set on")
def test_session_before_flask_3_1_3(make_app: AppFactory) -> None:
    """A session that is an attribute of the context is the one that tasks copy."""
    app = make_app(SECRET_KEY="test")

    with app.test_request_context() as context:
        run(int)
        context.session = SecureCookieSession({"colour": "red"})  # type: ignore[misc]
        assert run(lambda: session["colour"]).result(PATIENCE) == "red"


# Arguments


def generate() -> cabc.Iterator[int]:
    """Return a generator instead of doing the work."""
    yield 1


async def generate_async() -> cabc.AsyncIterator[int]:
    """Return an async generator instead of doing the work."""
    yield 1


class Greeting:
    """A task."""

    name = "mailer.greeting"

    def run(self) -> None:
        """Do nothing."""


WRONG: dict[str, tuple[cabc.Callable[[], object], type[Exception], str]] = {
    "number": (
        lambda: scoped(5),  # type: ignore[call-overload]
        TypeError,
        "scoped() takes a function, or keyword arguments as in @scoped(max_workers=2),"
        " not 5.",
    ),
    "text": (lambda: scoped("close"), TypeError, "not 'close'"),  # type: ignore[call-overload]
    "class": (lambda: scoped(Flask), TypeError, "not <class 'flask.app.Flask'>"),
    "generator": (lambda: scoped(generate), TypeError, "Use 'with open_scope()'"),
    "async generator": (
        lambda: scoped(generate_async),
        TypeError,
        "Use 'with open_scope()'",
    ),
    "limit": (lambda: scoped(timeout=0), ValueError, "timeout is 0, but must be"),
    "wait": (
        lambda: wait("5"),  # type: ignore[arg-type]
        TypeError,
        "wait() takes a number of seconds or None, not '5'.",
    ),
    "run": (
        lambda: run(5),  # type: ignore[call-overload]
        TypeError,
        "Pass the function and its arguments separately",
    ),
    "run of nothing": (lambda: run(None), TypeError, "not None. Pass the function"),  # type: ignore[call-overload]
    "run of text": (lambda: run("f"), TypeError, "not 'f'. Pass the function"),  # type: ignore[call-overload]
    "run of a generator": (
        lambda: run(generate()),  # type: ignore[call-overload]
        TypeError,
        "run(fn, x), not run(fn(x))",
    ),
    "run of a task's class": (
        lambda: run(Greeting),
        TypeError,
        "Pass an instance: run(Greeting(...)).",
    ),
    "bare task": (lambda: task(int), TypeError, "task's name first"),  # type: ignore[arg-type]
    "task of a number": (lambda: task(5), TypeError, "'mailer.welcome'), not 5."),  # type: ignore[arg-type]
    "task of nothing": (lambda: task(None), TypeError, "not None."),  # type: ignore[arg-type]
    "task without a name": (lambda: task(" "), TypeError, "not ' '."),
    "task on a result": (
        lambda: task("mailer.welcome")(5),  # type: ignore[type-var]
        TypeError,
        "task('mailer.welcome') names a function, not 5.",
    ),
    "app": (
        lambda: ApiTask("shop"),  # type: ignore[arg-type]
        TypeError,
        "ApiTask takes the Flask app, not 'shop'.",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(
    call: cabc.Callable[[], object], error: type[Exception], text: str
) -> None:
    """The error names the mistake, not a later consequence of it."""
    with pytest.raises(error) as caught:
        call()

    assert text in str(caught.value)


def test_run_of_a_coroutine(make_app: AppFactory) -> None:
    """A coroutine is not a function, in a request or elsewhere."""

    async def work() -> None:
        raise AssertionError

    with make_app().test_request_context():
        coroutine = work()

        with pytest.raises(TypeError, match=r"run\(fn, x\), not run\(fn\(x\)\)"):
            run(coroutine)  # type: ignore[call-overload]

        coroutine.close()


@pytest.mark.parametrize("limits", [{"max_workers": 0}, {"timeout": "x"}])
def test_limits_of_a_block(make_app: AppFactory, limits: dict[str, t.Any]) -> None:
    """A limit that is wrong is named where the block is entered."""
    name, value = limits.copy().popitem()
    text = f"{name} is {value!r}, but must be"

    with make_app().app_context(), pytest.raises(ValueError, match=text):
        with open_scope(**limits):
            pass


# await run()


def pass_on(event: threading.Event) -> str:
    """Wait for an event."""
    assert event.wait(PATIENCE)
    return "done"


def test_await_in_an_async_view(make_app: AppFactory) -> None:
    """A view that awaits a task lets its event loop go on."""
    app = make_app()

    @app.get("/")
    async def index() -> str:
        event = threading.Event()

        async def let_pass() -> None:
            event.set()

        # Begun by the loop when the view awaits, and not before.
        other = asyncio.create_task(let_pass())
        answer = await run(pass_on, event)
        await other
        return answer

    assert app.test_client().get("/").text == "done"


def test_await_of_a_task_that_fails(make_app: AppFactory) -> None:
    """What the task raises is raised in the view."""
    app = make_app()

    @app.get("/")
    async def index() -> str:
        with pytest.raises(ZeroDivisionError):
            await run(divmod, 1, 0)

        return str(await run(divmod, 1, 1))

    assert app.test_client().get("/").text == "(1, 0)"


def test_await_of_a_task_that_finds_nothing(make_app: AppFactory) -> None:
    """A StopIteration, such as that of next(), ends the waiting as well."""
    app = make_app(APITASK_MAX_WORKERS=1)

    @app.get("/")
    async def index() -> str:
        event = threading.Event()
        held = run(pass_on, event)
        # It is not done yet when it is awaited.
        nothing: cabc.Iterator[str] = iter(())
        empty = asyncio.ensure_future(asyncio.wait_for(run(next, nothing), PATIENCE))
        await asyncio.sleep(0)
        event.set()

        with pytest.raises(RuntimeError, match="StopIteration"):
            await empty

        return await held

    assert app.test_client().get("/").text == "done"


def test_await_of_a_task_that_is_cancelled(make_app: AppFactory) -> None:
    """A task that was cancelled never runs, and ends the waiting."""
    app = make_app(APITASK_MAX_WORKERS=1)

    @app.get("/")
    async def index() -> str:
        event = threading.Event()
        first = run(pass_on, event)
        second = run(pass_on, event)
        assert second.cancel()

        with pytest.raises(asyncio.CancelledError):
            await second

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(first)), 0.01)

        event.set()
        return await first

    assert app.test_client().get("/").text == "done"


def test_await_that_is_given_up(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that runs already is not affected if the view stops waiting for it."""
    app = make_app()

    @app.get("/")
    async def index() -> str:
        started, event = threading.Event(), threading.Event()

        def work() -> str:
            started.set()
            return pass_on(event)

        future = run(work)
        assert started.wait(PATIENCE)
        waiting = asyncio.ensure_future(future)
        await asyncio.sleep(0)
        waiting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await waiting

        event.set()
        return await future

    assert app.test_client().get("/").text == "done"
    assert caplog.records == []


def test_await_with_a_full_pool(make_app: AppFactory) -> None:
    """A task that is awaited gets a thread, however full the pool is."""
    app = make_app(APITASK_POOL_SIZE=1)
    event = threading.Event()

    @app.get("/")
    async def index() -> str:
        held = run(pass_on, event)
        answer = await run(str, "passed")
        event.set()
        return f"{answer} {await held}"

    assert app.test_client().get("/").text == "passed done"


def test_await_without_a_scope() -> None:
    """The future of a plain call can be awaited too."""

    async def main() -> str:
        return await run(str, "called")

    assert asyncio.run(main()) == "called"
