from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import logging.handlers
import os
import pickle
import queue
import sys
import threading
import typing as t
from unittest import mock

import pytest
from conftest import PATIENCE
from flask import Flask
from late_threads import make_late
from scopes import run_script

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import scoped
from flask_apitask import task
from flask_apitask import task_finished
from flask_apitask import task_started
from flask_apitask.executor.runner import TimeoutReport
from flask_apitask.log import PACKAGE
from flask_apitask.task_runner import TaskRunner

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory


class OutOfTheTree(BaseException):
    """An exception that no "except Exception" catches, like gevent's Timeout."""


def fail(error: BaseException | type[BaseException]) -> None:
    """Raise an error."""
    raise error


class Failing:
    """A task that is an object, of which nobody knows the code."""

    def __call__(self) -> None:
        raise ValueError

    def method(self) -> None:
        raise ValueError


@pytest.fixture
def logger(make_app: AppFactory) -> cabc.Iterator[logging.Logger]:
    """Return the logger of the apps, which all have one name, for a test to break."""
    logger = make_app().logger
    before = logger.handlers[:], logger.filters[:], logger.level, logger.disabled
    yield logger
    logger.handlers[:], logger.filters[:] = before[:2]
    logger.setLevel(before[2])
    logger.disabled = before[3]


@pytest.mark.parametrize("when", ["in view", "at the end", "after the response"])
@pytest.mark.parametrize(
    "error_type",
    [
        ValueError,
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        asyncio.CancelledError,
        OutOfTheTree,
    ],
)
def test_failing_task(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    error_type: type[BaseException],
    when: str,
) -> None:
    """A task that raises anything at all is contained, and logged (behaviour 11)."""
    app = make_app(APITASK_WAIT="close" if when == "after the response" else "teardown")
    error = error_type()
    done: list[str] = []
    futures = []

    @app.get("/reset/<token>")
    def index(token: str) -> str:
        futures.append(run(fail, error))
        run(done.append, "second")
        run(done.append, "third")
        return "ok"

    if when != "in view":
        make_late(app)

    response = app.test_client().get("/reset/secret", buffered=True)
    assert (response.status_code, response.text) == (200, "ok")
    assert sorted(done) == ["second", "third"]
    assert futures[0].exception(0) is error
    (record,) = t.cast("list[t.Any]", caplog.records)
    assert (record.levelname, record.name) == ("ERROR", app.logger.name)
    assert record.exc_info[1] is error
    assert record.apitask_task == f"{__name__}.fail"
    assert record.apitask_endpoint == "index"
    assert 0 <= record.apitask_duration < PATIENCE
    assert (record.module, record.funcName) == ("test_log", "fail")
    # By the rule, as the path may hold a secret.
    text = f"Task '{__name__}.fail' of GET /reset/<token> failed after 0."
    assert record.getMessage().startswith(text)


@pytest.mark.parametrize("plain", [False, True])
def test_traceback_of_an_async_task(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, plain: bool
) -> None:
    """It names the task's own error, not an earlier one."""
    app = make_app()
    error = LookupError()

    async def work() -> None:
        fail(error)

    if plain:
        with pytest.raises(LookupError):
            run(work)
    else:
        with app.test_request_context():
            run(work)

    assert len(caplog.records) == (0 if plain else 1)
    assert error.__context__ is None


@pytest.mark.parametrize("in_request", [False, True])
def test_failing_task_without_a_view(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, in_request: bool
) -> None:
    """In a command, or in a request without a route, it is logged so (behaviour 11)."""
    app = make_app()
    where = app.test_request_context("/missing") if in_request else app.app_context()

    with where, open_scope():
        run(divmod, 1, 0)

    (record,) = t.cast("list[t.Any]", caplog.records)
    assert record.apitask_endpoint is None
    of_request = " of GET (no route)" if in_request else ""
    assert record.getMessage().startswith(f"Task 'builtins.divmod'{of_request} failed")


def test_view_gets_the_exception_if_it_asks(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """future.result() raises in the view what the task did; it is logged once."""
    app = make_app()

    @app.get("/")
    def index() -> str:
        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0).result(PATIENCE)

        return "ok"

    assert app.test_client().get("/").status_code == 200
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (functools.partial(functools.partial(fail), ValueError), "fail"),
        (Failing().method, "method"),
        (Failing(), "index"),
        (functools.partial(divmod, 1, 0), "index"),
        (mock.Mock(side_effect=ValueError), "index"),
        (mock.MagicMock(spec=fail, side_effect=ValueError), "index"),
        (functools.wraps(fail)(lambda: fail(ValueError)), "fail"),
        # Code of this package: it is not what the record is about.
        (scoped(Failing()), "index"),
    ],
)
def test_place_of_the_record(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, work: t.Any, name: str
) -> None:
    """A record names the code of the task as its place, or that of the view."""
    app = make_app()

    @app.get("/")
    def index() -> str:
        run(work)
        return "ok"

    assert app.test_client().get("/").status_code == 200
    (record,) = caplog.records
    assert (record.module, record.funcName) == ("test_log", name)
    assert isinstance(record.lineno, int)


@pytest.mark.parametrize("signal", [task_started, task_finished])
def test_receiver_that_fails(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, signal: t.Any
) -> None:
    """A receiver that raises is logged, and its task runs (behaviour 11)."""
    app = make_app()

    def broken(sender: Flask, **fields: t.Any) -> None:
        raise LookupError("receiver")

    with signal.connected_to(broken), app.test_request_context():
        assert run(str, "task").result(PATIENCE) == "task"

    (record,) = caplog.records
    assert record.getMessage() == f"A receiver of the signal '{signal.name}' failed."
    assert record.exc_info


def test_done_callback_that_fails(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A done callback that raises is logged, after a task and after a plain call."""
    app = make_app()

    def broken(future: object) -> None:
        raise LookupError("callback")

    with app.test_request_context():
        run(str).add_done_callback(broken)

    with app.app_context():
        run(str).add_done_callback(broken)

    # Without an app there is no logger of one.
    run(str).add_done_callback(broken)
    names = [record.name for record in caplog.records]
    assert names == [app.logger.name, app.logger.name, "flask_apitask"]
    text = "The done callback 'test_log.test_done_callback_that_fails.<locals>.broken'"
    assert caplog.messages[0] == f"{text} of GET (no route) failed."
    assert caplog.messages[1] == f"{text} failed."
    assert all(record.exc_info for record in caplog.records)


# What an app may have done to its log.


class BrokenHandler(logging.Handler):
    """A handler that raises, as one that writes to a network may."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no log today")


def fail_in_request(app: Flask) -> BaseException | None:
    """Have a task fail, and return what its future has of it."""
    with app.test_request_context():
        return run(divmod, 1, 0).exception(PATIENCE)


@pytest.mark.parametrize("how", ["handler", "filter", "factory", "disabled"])
def test_log_that_can_not_be_written(
    make_app: AppFactory,
    capsys: pytest.CaptureFixture[str],
    logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """The text goes to stderr instead, and the task keeps its own error (19c)."""

    def broken(*args: object, **kwargs: object) -> t.NoReturn:
        raise OSError("no log today")

    if how == "handler":
        logger.addHandler(BrokenHandler())
    elif how == "filter":
        logger.addFilter(broken)
    elif how == "disabled":
        logger.disabled = True
    else:
        monkeypatch.setattr(logging, "_logRecordFactory", broken)
        logger.propagate = True

    with mock.patch.object(logger, "parent", None):
        assert isinstance(fail_in_request(make_app()), ZeroDivisionError)

    written = capsys.readouterr().err
    assert "Task 'builtins.divmod' of GET (no route) failed after 0." in written
    assert "ZeroDivisionError" in written
    cause = f"The logger '{logger.name}' is disabled." if how == "disabled" else ""
    assert (cause or "This could not be logged:\n") in written
    assert ("no log today" in written) is (how != "disabled")


def test_nothing_can_be_written(
    make_app: AppFactory, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even without a stderr, the task keeps its own error (19c)."""
    logger.disabled = True
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(fail_in_request(make_app()), ZeroDivisionError)


def test_level_that_hides_it(
    make_app: AppFactory, capsys: pytest.CaptureFixture[str], logger: logging.Logger
) -> None:
    """An app that wants no such records has none, and nothing on stderr."""
    logger.setLevel(logging.CRITICAL + 1)

    for disabled in (False, True):
        logger.disabled = disabled
        assert isinstance(fail_in_request(make_app()), ZeroDivisionError)
        assert capsys.readouterr().err == ""


def test_record_factory_that_sets_the_same_names(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that an app's own factory sets do not collide with ours (behaviour 11)."""
    factory = logging.getLogRecordFactory()

    def own(*args: t.Any, **kwargs: t.Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        vars(record).update(task="own", endpoint="own", duration="own", action="own")
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", own)
    assert isinstance(fail_in_request(make_app()), ZeroDivisionError)
    (record,) = t.cast("list[t.Any]", caplog.records)
    assert (record.task, record.apitask_task) == ("own", "builtins.divmod")


# What an app may have put in the place of its logger.


class Prefixing(logging.LoggerAdapter):  # type: ignore[type-arg]
    """The adapter of Python's documentation."""

    def process(self, msg: t.Any, kwargs: t.Any) -> t.Any:
        return f"[100%] {msg}", kwargs


class Braces:
    """A message that is formatted with braces, as in Python's logging cookbook."""

    def __init__(self, text: str, args: tuple[object, ...]) -> None:
        self.text, self.args = text, args

    def __str__(self) -> str:
        return self.text.format(*self.args)


class BraceAdapter(logging.LoggerAdapter):  # type: ignore[type-arg]
    """The adapter of the cookbook that formats with braces."""

    def log(self, level: int, msg: t.Any, *args: t.Any, **kwargs: t.Any) -> None:
        if self.isEnabledFor(level):
            msg, fields = self.process(msg, kwargs)
            self.logger.log(level, Braces(msg, args), **fields)


class BraceRecord(logging.LogRecord):
    """A record that formats with braces."""

    def getMessage(self) -> str:
        return str(self.msg).format(*self.args or ()) if self.args else str(self.msg)


@task("shop.{braces} 100%")
def fail_with_braces() -> None:
    """Fail, under a name that each style of formatting may stumble over."""
    raise ValueError


def has_text(text: str) -> bool:
    """Return whether a text says all about the failure."""
    return "Task 'shop.{braces} 100%' of GET (no route) failed after 0." in text


@pytest.mark.parametrize(
    ("adapt", "prefix", "extra"),
    [
        (lambda logger: logging.LoggerAdapter(logger, {"site": "shop"}), "", "shop"),
        (lambda logger: logging.LoggerAdapter(logger, {}), "", None),
        (lambda logger: Prefixing(logger, {"site": "shop"}), "[100%] ", None),
        (lambda logger: BraceAdapter(logger, {"site": "shop"}), "", "shop"),
        (
            lambda logger: Prefixing(logging.LoggerAdapter(logger, {"site": "in"}), {}),
            "[100%] ",
            "in",
        ),
    ],
    ids=["plain", "empty", "prefixing", "braces", "nested"],
)
def test_adapter(
    make_app: AppFactory,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    adapt: t.Any,
    prefix: str,
    extra: str | None,
) -> None:
    """An adapter adds its part, and the record has all that it has without one."""
    app = make_app()
    app.logger = adapt(logging.getLogger("test_log.adapted"))

    with app.test_request_context():
        run(fail_with_braces)

    (record,) = t.cast("list[t.Any]", caplog.records)
    assert has_text(record.getMessage())
    assert record.getMessage().startswith(f"{prefix}Task ")
    assert getattr(record, "site", None) == extra
    assert record.apitask_task == "shop.{braces} 100%"
    assert (record.module, record.funcName) == ("test_log", "fail_with_braces")
    assert record.exc_info[0] is ValueError
    assert capsys.readouterr().err == ""


def test_adapter_at_a_level_that_hides_it(
    make_app: AppFactory, capsys: pytest.CaptureFixture[str], logger: logging.Logger
) -> None:
    """A disabled logger behind an adapter is reported, and a hidden level is not."""
    app = make_app()
    app.logger = t.cast("t.Any", logging.LoggerAdapter(logger, {}))
    logger.disabled = True
    assert isinstance(fail_in_request(app), ZeroDivisionError)
    assert f"The logger '{logger.name}' is disabled." in capsys.readouterr().err
    logger.setLevel(logging.CRITICAL)
    assert isinstance(fail_in_request(app), ZeroDivisionError)
    assert capsys.readouterr().err == ""


def import_library(name: str) -> t.Any:
    """Import a library that only these tests need."""
    if os.environ.get("APITASK_REQUIRE_SERVICES") == "1":
        return importlib.import_module(name)

    return pytest.importorskip(name)


@pytest.mark.parametrize("is_wrapper", [False, True])
def test_structlog(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, is_wrapper: bool
) -> None:
    """A logger of structlog has the text, the fields and the exception."""
    structlog = import_library("structlog")
    events: list[t.Any] = []

    def capture(logger: object, method: str, event: dict[str, t.Any]) -> t.Any:
        events.append((method, event.copy()))

        if not is_wrapper:
            raise structlog.DropEvent

        return structlog.stdlib.render_to_log_kwargs(logger, method, event)

    app = make_app()
    kind = structlog.stdlib.BoundLogger if is_wrapper else None
    inner = logging.getLogger("test_log.structlog")
    app.logger = structlog.wrap_logger(inner, [capture], wrapper_class=kind)

    with app.test_request_context():
        run(fail_with_braces)

    ((method, event),) = events
    assert method == "error"
    assert has_text(event["event"])
    assert event["exc_info"][0] is ValueError
    assert event["apitask_task"] == "shop.{braces} 100%"
    records = t.cast("list[t.Any]", caplog.records)
    tasks = [record.apitask_task for record in records]
    assert tasks == (["shop.{braces} 100%"] if is_wrapper else [])


def test_loguru() -> None:
    """A logger of Loguru has them as well, though it takes no exc_info."""
    import_library("loguru")
    script = """
        from flask import Flask
        from flask_apitask import ApiTask, run, task
        from loguru import logger

        @task("shop.{braces} 100%")
        def fail():
            raise ValueError

        def tell(message):
            record = message.record
            text = "Task 'shop.{braces} 100%' of GET (no route) failed after 0."
            assert record["message"].startswith(text)
            assert record["exception"].type is ValueError
            print(record["level"].name, record["extra"]["apitask_task"])

        logger.remove()
        logger.add(tell)
        app = Flask("shop")
        app.logger = logger
        ApiTask(app)

        with app.test_request_context():
            run(fail)
    """
    assert run_script(script) == "ERROR shop.{braces} 100%\n"


def test_mock(make_app: AppFactory, capsys: pytest.CaptureFixture[str]) -> None:
    """A mock is called as Flask itself would call the logger."""
    app = make_app()
    app.logger = mock.Mock()

    with app.test_request_context():
        run(fail_with_braces)

    ((text,), kwargs) = app.logger.error.call_args
    assert has_text(text)
    assert kwargs["exc_info"][0] is ValueError
    assert kwargs["extra"]["apitask_task"] == "shop.{braces} 100%"
    assert capsys.readouterr().err == ""


class OnlyText:
    """A logger of the app's own, which takes nothing but a text."""

    def error(self, text: str) -> None:
        raise AssertionError


def test_logger_with_another_signature(
    make_app: AppFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a logger takes other arguments, the text goes to stderr and is not lost."""
    app = make_app()
    app.logger = t.cast("t.Any", OnlyText())

    with app.test_request_context():
        assert isinstance(run(fail_with_braces).exception(PATIENCE), ValueError)

    written = capsys.readouterr().err
    assert has_text(written)
    assert "ValueError" in written
    assert "This could not be logged:\n" in written


class AppWithoutLogger(Flask):
    """An app whose logger can't be had."""

    @property
    def logger(self) -> t.Any:
        raise LookupError


def test_logger_that_can_not_be_had(caplog: pytest.LogCaptureFixture) -> None:
    """Where an app's logger can't be had, Python's own one has the record."""
    app = AppWithoutLogger(__name__)
    ApiTask(app)
    assert isinstance(fail_in_request(app), ZeroDivisionError)
    (record,) = caplog.records
    assert record.name == app.name
    assert record.exc_info


def test_factory_that_formats_with_braces(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A record that formats in another style has the whole text."""
    monkeypatch.setattr(logging, "_logRecordFactory", BraceRecord)

    with make_app().test_request_context():
        run(fail_with_braces)

    (record,) = t.cast("list[t.Any]", caplog.records)
    assert has_text(record.getMessage())
    assert record.apitask_task == "shop.{braces} 100%"


def test_factory_with_defaults_for_our_names(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A factory may set our names, so that a format can name them in each record."""
    factory = logging.getLogRecordFactory()

    def own(*args: t.Any, **kwargs: t.Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        vars(record).update(apitask_task="-", apitask_action="-")
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", own)
    assert isinstance(fail_in_request(make_app()), ZeroDivisionError)
    (record,) = t.cast("list[t.Any]", caplog.records)
    names = record.apitask_task, record.apitask_action
    assert names == ("builtins.divmod", "-")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("disabled", [False, True])
def test_logging_that_is_switched_off(
    make_app: AppFactory,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    logger: logging.Logger,
    disabled: bool,
) -> None:
    """After logging.disable() nothing is logged, and nothing is told in its place."""
    logger.disabled = disabled
    logging.disable()

    try:
        assert isinstance(fail_in_request(make_app()), ZeroDivisionError)
    finally:
        logging.disable(logging.NOTSET)

    assert (caplog.records, capsys.readouterr().err) == ([], "")


@pytest.mark.parametrize("raise_exceptions", [False, True])
@pytest.mark.parametrize("broken", ["emit", "filter", "stream"])
def test_handler_that_raises(
    make_app: AppFactory,
    capsys: pytest.CaptureFixture[str],
    logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    raise_exceptions: bool,
    broken: str,
) -> None:
    """It goes to stderr, unless the handler swallowed it as the app wants."""
    monkeypatch.setattr(logging, "raiseExceptions", raise_exceptions)
    handler = logging.StreamHandler(t.cast("t.Any", None))
    handler.stream = t.cast("t.Any", mock.Mock(write=mock.Mock(side_effect=OSError)))

    if broken == "emit":
        handler = t.cast("t.Any", BrokenHandler())
    elif broken == "filter":
        handler.addFilter(mock.Mock(filter=mock.Mock(side_effect=OSError)))

    logger.addHandler(handler)
    assert isinstance(fail_in_request(make_app()), ZeroDivisionError)
    written = capsys.readouterr().err
    text = "Task 'builtins.divmod' of GET (no route) failed after 0."
    # In "stream", Python tells it itself.
    told = text if broken != "stream" else "--- Logging error ---"
    assert (told in written) is (raise_exceptions or broken != "stream")


def test_queue_handler(
    make_app: AppFactory, logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    """A record passes through a queue, and through a pickle to another process."""
    queued: queue.SimpleQueue[t.Any] = queue.SimpleQueue()
    logger.addHandler(logging.handlers.QueueHandler(queued))
    assert isinstance(fail_in_request(make_app()), ZeroDivisionError)
    record = pickle.loads(pickle.dumps(queued.get(timeout=PATIENCE)))
    assert "of GET (no route) failed after 0." in record.getMessage()
    assert "ZeroDivisionError" in record.getMessage()
    assert record.apitask_task == "builtins.divmod"
    # The other handlers have theirs.
    assert caplog.records[0].exc_info
    sent = logging.handlers.SocketHandler("127.0.0.1", None).makePickle(record)
    assert pickle.loads(sent[4:])["apitask_endpoint"] is None


def test_configuration_that_disables_loggers() -> None:
    """Where dictConfig() comes late and disables the loggers, stderr has the text."""
    script = """
        import contextlib, io, logging.config
        from flask import Flask
        from flask_apitask import ApiTask, run

        app = Flask("shop")
        ApiTask(app)
        app.logger
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})

        with contextlib.redirect_stderr(io.StringIO()) as written:
            with app.test_request_context():
                run(divmod, 1, 0)

        assert "Task 'builtins.divmod' of GET (no route)" in written.getvalue()
        assert "The logger 'shop' is disabled." in written.getvalue()
        print("told")
    """
    assert run_script(script) == "told\n"


# What a record is about.


@pytest.mark.parametrize("signal", [task_started, task_finished])
def test_place_of_a_receiver(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, signal: t.Any
) -> None:
    """A receiver that raises is named by the line that raised."""
    app = make_app()

    def broken(sender: Flask, **fields: t.Any) -> None:
        fail(LookupError)

    with signal.connected_to(broken), app.test_request_context():
        run(int)

    (record,) = caplog.records
    assert (record.module, record.funcName) == ("test_log", "fail")


def test_place_of_a_mistake(caplog: pytest.LogCaptureFixture) -> None:
    """A mistake in the configuration is located at the line that put it into effect."""
    app = Flask(__name__)
    app.config["APITASK_TIMOUT"] = 1
    ApiTask(app)
    (record,) = caplog.records
    place = "test_log", "test_place_of_a_mistake"
    assert (record.module, record.funcName) == place


def test_place_without_a_view_or_code_of_the_task(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A record is never about a line of this package."""
    with make_app().app_context(), open_scope():
        run(divmod, 1, 0)

    (record,) = caplog.records
    assert not record.pathname.startswith(PACKAGE)


def test_place_in_a_package_called_alike(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A package whose name begins as ours does has records of its own."""
    path = f"{PACKAGE.rstrip(os.sep)}_shop{os.sep}tasks.py"
    names: dict[str, t.Any] = {}
    exec(compile("def work(): 1 / 0", path, "exec"), names)

    with make_app().test_request_context():
        run(names["work"])

    (record,) = caplog.records
    assert (record.pathname, record.funcName) == (path, "work")


class Everything:
    """Has every attribute, as a method of :class:`xmlrpc.client.ServerProxy` does."""

    def __getattr__(self, name: str) -> Everything:
        return Everything()

    def __call__(self) -> None:
        raise KeyError


class Nothing(Everything):
    """Raises for an attribute that it lacks, as an unbound proxy does."""

    def __getattr__(self, name: str) -> Everything:
        raise RuntimeError(name)


class Wraps(Failing):
    """Says that it wraps itself."""

    @property
    def __wrapped__(self) -> Wraps:
        return self


@pytest.mark.parametrize("kind", [Everything, Nothing, Wraps])
def test_task_with_odd_attributes(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    kind: type[t.Any],
) -> None:
    """A proxy that is asked for its name or its code keeps nothing from the log."""
    name = f"{__name__}.{kind.__name__}"
    expected = ValueError if kind is Wraps else KeyError
    begun, hang = threading.Event(), threading.Event()

    class Hangs(kind):  # type: ignore[misc]
        def __call__(self) -> None:
            begun.set()
            assert hang.wait(PATIENCE)

    app = make_app(APITASK_TIMEOUT=0.1, APITASK_MAX_WORKERS=1)

    @app.post("/")
    def index() -> str:
        assert isinstance(run(kind()).exception(PATIENCE), expected)
        run(Hangs())
        assert begun.wait(PATIENCE)
        run(kind())
        return "ok"

    try:
        # A body is shared by the name of the method that is the task.
        assert app.test_client().post("/", data=b"x").text == "ok"
    finally:
        hang.set()

    failed, cancelled, overdue = (record.getMessage() for record in caplog.records)
    assert failed.startswith(f"Task '{name}' of POST / failed after")
    assert cancelled.startswith(f"Task '{name}' of POST / was cancelled:")
    assert "Hangs':\n" in overdue


# What a deadline leaves behind.


def test_report_of_a_request_at_its_deadline(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """An ERROR for each task that never ran, and a WARNING for what goes on (18)."""
    app = make_app(APITASK_TIMEOUT=0.05, APITASK_MAX_WORKERS=1)
    begun, release = threading.Event(), threading.Event()
    futures: list[t.Any] = []

    def work() -> None:
        begun.set()
        release.wait(PATIENCE)

    @app.get("/<name>")
    def index(name: str) -> str:
        futures.append(run(work))
        futures.append(run(str))
        assert begun.wait(PATIENCE)
        return "ok"

    assert app.test_client().get("/name").status_code == 200
    release.set()
    futures[0].result(PATIENCE)
    cancelled, running = t.cast("list[t.Any]", caplog.records)
    assert cancelled.levelname == "ERROR"
    assert cancelled.getMessage() == (
        "Task 'builtins.str' of GET /<name> was cancelled: not started within 0.05 s"
        " (APITASK_TIMEOUT)."
    )
    assert running.levelname == "WARNING"
    name = "test_log.test_report_of_a_request_at_its_deadline.<locals>.work"
    assert running.apitask_tasks == [name]
    assert (running.apitask_abandoned_threads, running.apitask_endpoint) == (1, "index")
    assert running.getMessage().startswith(
        "Stopped waiting for the tasks of GET /<name> after 0.05 s (APITASK_TIMEOUT): 1"
        " task(s) still running. Overdue tasks now hold 1 thread(s) of the app. Stacks"
        f" of those still running:\n\n{name!r}:\n"
    )
    assert "release.wait(PATIENCE)" in running.getMessage()


def test_report_of_tasks_that_never_ran(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """If no task is still running, there is no WARNING (18)."""
    app = make_app(APITASK_TIMEOUT=0.5)

    with app.app_context():
        TaskRunner(app, None).report(TimeoutReport(0.5, ["a", "b"], [], 0))

    assert caplog.messages == [
        f"Task '{name}' was cancelled: not started within 0.5 s (APITASK_TIMEOUT)."
        for name in "ab"
    ]
