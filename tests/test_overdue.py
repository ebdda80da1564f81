from __future__ import annotations

import asyncio
import queue
import re
import socket
import threading
import typing as t

import flask_mail
import pytest
from conftest import PATIENCE
from conftest import wait_until
from late_threads import in_time
from scopes import Gate

from flask_apitask import run
from flask_apitask.mail.sending import deliveries

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory
    from flask import Flask

# Seconds. It is short, as tests are stuck for as long.
DEADLINE = 0.05
NO_STACK = (
    "  (no stack: the task is async or not written in Python, or no thread is running"
    " it)"
)


@pytest.fixture
def gate() -> cabc.Iterator[Gate]:
    """Where tasks are stuck until the end of the test."""
    gate = Gate()
    yield gate
    gate.opened.set()


def report(app: Flask, caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """Make a request that leaves a task behind, and return its first lines and all."""
    assert in_time(app.test_client().get, "/").status_code == 200
    (record,) = [
        r
        for r in caplog.records
        if "Stopped waiting for the tasks of GET /" in r.getMessage()
    ]
    text = record.getMessage().partition("running:\n\n")[2]
    assert not re.search(r"flask_apitask/\w+\.py", text)
    return "\n".join(text.splitlines()[:2]), text


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_stack_begins_with_the_task(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
    is_wrapped: bool,
) -> None:
    """The stack of a task has no frame of the code that calls tasks.

    Nor of a tool such as Sentry, which wraps the start of each thread.
    """
    app = make_app(APITASK_TIMEOUT=DEADLINE)

    if is_wrapped:
        run_thread = threading.Thread.run
        monkeypatch.setattr(threading.Thread, "run", lambda thread: run_thread(thread))

    def work() -> None:
        gate()

    @app.get("/")
    def index() -> str:
        run(work)
        assert gate.begun.wait(PATIENCE)
        return "ok"

    first, text = report(app, caplog)
    line = work.__code__.co_firstlineno + 1
    assert f'  File "{__file__}", line {line}, in work' in first
    assert text.count("  File") >= 2


def test_stack_of_a_task_of_the_standard_library(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, gate: Gate
) -> None:
    """A function of ``threading`` is not taken for the start of the thread."""
    app = make_app(APITASK_TIMEOUT=DEADLINE)

    @app.get("/")
    def index() -> str:
        run(gate.opened.wait, PATIENCE)
        # It is in that function, and waits.
        wait_until(lambda: bool(gate.opened._cond._waiters))  # type: ignore[attr-defined]
        return "ok"

    first, _ = report(app, caplog)
    assert f'File "{threading.__file__}"' in first
    assert first.endswith(", in wait")


def test_async_task_has_no_stack(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, gate: Gate
) -> None:
    """Its thread waits for the event loop that it runs on, and says so."""
    app = make_app(APITASK_TIMEOUT=DEADLINE)

    async def work() -> None:
        await asyncio.get_running_loop().run_in_executor(None, gate)

    @app.get("/")
    def index() -> str:
        run(work)
        assert gate.begun.wait(PATIENCE)
        return "ok"

    first, text = report(app, caplog)
    assert first.endswith(NO_STACK)
    assert "asgiref" not in text


def test_function_in_c_has_no_stack(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task such as ``time.sleep`` has no line of Python to show."""
    app = make_app(APITASK_TIMEOUT=DEADLINE)
    items: queue.SimpleQueue[int] = queue.SimpleQueue()

    @app.get("/")
    def index() -> str:
        wait_until(run(items.get).running)
        return "ok"

    first, _ = report(app, caplog)
    items.put(1)
    assert first.endswith(NO_STACK)


def test_stack_of_a_mail(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """That of a mail begins where the delivery does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        connections: list[socket.socket] = []
        app = make_app(
            APITASK_TIMEOUT=DEADLINE,
            APITASK_MAIL_BACKGROUND=True,
            APITASK_MAIL_TIMEOUT=PATIENCE,
            MAIL_PORT=silent.getsockname()[1],
            TESTING=False,
        )
        mail = flask_mail.Mail(app)

        @app.get("/")
        def index() -> str:
            mail.send_message("hi", sender="a@x.org", recipients=["b@x.org"])
            connections.append(silent.accept()[0])
            return "ok"

        first, _ = report(app, caplog)
        # It is let go, and finds nobody when it tries again.
        silent.close()
        connections[0].close()
        wait_until(lambda: not app.extensions["apitask"].pool._busy)

    assert first.startswith("'flask_mail.send':\n")
    assert first.endswith(f", in {deliveries['flask_mail.send'].__name__}")
