from __future__ import annotations

import concurrent.futures
import contextvars
import gc
import math
import threading
import time
import typing as t

import pytest
from conftest import wait_until
from flask import Flask
from flask_mail import email_dispatched
from flask_mail import Mail
from flask_mail import Message
from mail_time import unhurried
from smtp_servers import Fault
from smtp_servers import run_script
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask.executor.task import exit_grace
from flask_apitask.mail import pool as pool_module
from flask_apitask.mail import sending
from flask_apitask.mail.envelope import SMTPSettings
from flask_apitask.mail.reaper import reaper
from flask_apitask.mail.sending import deliveries

if t.TYPE_CHECKING:
    from flask_apitask.mail.pool import ConnectionPool


class MailApp(t.NamedTuple):
    """An app with its mail rerouted."""

    app: Flask
    mail: Mail


def make_app(server: ScriptedServer, **config: t.Any) -> MailApp:
    """Make an app that sends to a server."""
    app = Flask(__name__)
    app.config.update(
        MAIL_SERVER="localhost",
        MAIL_PORT=server.port,
        MAIL_DEFAULT_SENDER="shop@example.org",
        APITASK_MAIL_BACKGROUND=True,
    )
    app.config.update(config)
    mail = Mail(app)
    ApiTask(app)
    return MailApp(app, mail)


def letter(subject: str = "hello", body: str = "text") -> Message:
    """Make a message that can be sent."""
    return Message(subject, ["ada@example.org"], body)


def find_settings(secret: str) -> list[SMTPSettings]:
    """Find the settings with a password like that, wherever they are kept."""
    gc.collect()
    found = [kept for kept in gc.get_objects() if isinstance(kept, SMTPSettings)]
    return [settings for settings in found if secret in (settings.password or "")]


@pytest.mark.parametrize(("keepalive", "tenants"), [(0, 200), (0.2, 1_000)])
def test_nothing_is_left_of_many_tenants(keepalive: float, tenants: int) -> None:
    """After the keepalive there is no thread, no socket, no pool and no password."""
    began = time.monotonic()

    with ScriptedServer() as server:
        app, mail = make_app(server, APITASK_MAIL_KEEPALIVE=keepalive)
        threads = set()

        for number in range(tenants):
            with app.test_request_context(), open_scope():
                app.extensions["mail"].password = f"tenant-{number}"
                mail.send(letter())

            threads |= {
                thread
                for thread in threading.enumerate()
                if thread.name == "apitask-mail-reaper"
            }

        app.extensions["mail"].password = None
        assert len(server.taken) == tenants
        server.wait_for(lambda: server.open == 0)
        wait_until(lambda: reaper.thread is None)
        assert server.quits == tenants
        # One at a time, and mostly one in all.
        longest = time.monotonic() - began
        assert len(threads) <= (1 + longest / keepalive if keepalive else 0)
        assert not find_settings("tenant-")
        assert not reaper.pools
        assert not list(pool_module._pools)


def test_what_closes_connections_keeps_nothing_of_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread is started in an empty context."""
    start = threading.Thread.start
    kept: dict[str, int] = {}

    def note(self: threading.Thread) -> None:
        kept[self.name] = len(contextvars.copy_context())
        start(self)

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("of the request")

    with ScriptedServer() as server:
        app, mail = make_app(server, APITASK_MAIL_KEEPALIVE=0.1)
        monkeypatch.setattr(threading.Thread, "start", note)

        with app.app_context():
            mail.send(letter())

        server.wait_for(lambda: server.open == 0)

    assert kept["apitask-mail-reaper"] == 0


def test_a_newsletter_is_held_in_part() -> None:
    """Sixty messages of 1 MiB in a block take far less than 60 MiB of memory."""
    with ScriptedServer() as server:
        shown = run_script(
            """
import sys, tracemalloc
from flask import Flask
from flask_apitask import ApiTask
from flask_mail import Mail, Message

app = Flask(__name__)
app.config.update(
    MAIL_PORT=int(sys.argv[1]), MAIL_DEFAULT_SENDER="shop@example.org",
    APITASK_MAIL_BACKGROUND=True,
)
mail = Mail(app)
ApiTask(app)
rendered = 0

@app.get("/")
def view():
    global rendered
    tracemalloc.start()

    with mail.connect() as connection:
        for number in range(60):
            body = f"{number:0511}\\n" * 2 ** 11
            connection.send(Message("news", ["ada@example.org"], body))
            rendered += len(body)

    return ""

app.test_client().get("/")
print(tracemalloc.get_traced_memory()[1] / rendered)
""",
            f"{server.port}",
        )

    assert len(server.taken) == 60
    assert server.connects == 1
    assert float(shown) < 0.5


def test_a_large_block_begins_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block has collected is delivered in order, while it goes on."""
    monkeypatch.setattr(sending, "BATCH", 10_000)

    with ScriptedServer() as server:
        app, mail = make_app(server, APITASK_MAIL_KEEPALIVE=1)

        with app.test_request_context(), open_scope():
            with mail.connect() as connection:
                for number in range(20):
                    connection.send(letter(f"number {number}", "x\n" * 1_500))

                server.wait_for(lambda: len(server.taken) >= 10)

        assert server.connects == 1
        pool_of(app).close_idle()

    subjects = [taken.content.partition(b"Subject: ")[2] for taken in server.taken]
    numbers = [int(subject.split(b"\r\n")[0].split()[1]) for subject in subjects]
    assert numbers == list(range(20))


def pool_of(app: Flask) -> ConnectionPool:
    """Return the pool that an app sends with now."""
    pool: ConnectionPool = app.extensions["apitask_mail"].pool(app.extensions["mail"])
    return pool


def test_a_large_block_gives_up_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that can't be reached costs one timeout, however large a block is."""
    monkeypatch.setattr(sending, "BATCH", 10_000)

    with ScriptedServer() as server:
        app, mail = make_app(server)
        server.fail(Stage.GREETING, *[Fault.SILENCE] * 20)

        with (
            unhurried(server) as waits,
            app.test_request_context(),
            open_scope(),
            mail.connect() as connection,
        ):
            for _ in range(20):
                connection.send(letter(body="x\n" * 1_500))

    assert server.connects == len(waits) == 1
    assert caplog.text.count("It was not attempted.") == 19


def test_a_large_block_past_the_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch that is cancelled does not stop the view."""
    monkeypatch.setattr(sending, "BATCH", 1)

    with ScriptedServer() as server:
        app, mail = make_app(server, APITASK_MAIL_KEEPALIVE=0)

        with app.test_request_context(), open_scope() as scope:
            with mail.connect() as connection:
                connection.send(letter("one"))
                block = connection._block  # type: ignore[attr-defined]
                block._delivery.exception()
                cancelled = scope.submit(str)
                monkeypatch.setattr(type(cancelled), "exception", raise_cancelled)
                connection.send(letter("two"))
                monkeypatch.undo()

    assert len(server.taken) == 2
    assert not caplog.records


def raise_cancelled(self: object, timeout: float | None = None) -> None:
    """Be the future of a task that was cancelled."""
    raise concurrent.futures.CancelledError


def test_messages_are_kept_for_those_who_listen() -> None:
    """A copy of a message is held while it waits, if anybody is to be told of it."""
    told: list[str] = []

    def receive(sender: Flask, message: Message) -> None:
        told.append(message.subject)

    with ScriptedServer() as server:
        app, mail = make_app(server, APITASK_MAIL_KEEPALIVE=0)

        with app.test_request_context(), open_scope(), mail.connect() as connection:
            connection.send(letter("one"))

            with email_dispatched.connected_to(receive, app):
                connection.send(letter("two"))

            kept = connection._block._batch  # type: ignore[attr-defined]
            assert [message is not None for _, message in kept] == [False, True]

        with email_dispatched.connected_to(receive, app), app.test_request_context():
            mail.send(letter("three"))

    assert told == ["three"]


def test_the_exit_waits_for_mail() -> None:
    """A mail is not cut off at the exit: the timeouts of its connection bound it."""
    graces = {exit_grace(deliver, 1.0) for deliver in deliveries.values()}
    assert graces == {math.inf}
