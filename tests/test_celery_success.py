"""Deferred tasks that go to Celery, and what tests record of tasks that go there."""

from __future__ import annotations

import subprocess
import sys
import typing as t

import pytest
from flask_mail import Message

from flask_apitask import run
from flask_apitask import run_on_commit
from flask_apitask import run_on_success
from flask_apitask.testing import record_tasks

pytest.importorskip("celery")
pytest.importorskip("redis")

from celery.result import AsyncResult
from celery.result import EagerResult
from celery_app import double
from celery_app import mail
from redis import Redis

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from brokers import Broker
    from celery_app import Celeries
    from flask import Flask

EAGER = {"task_always_eager": True}
NO_BROKER = "redis://127.0.0.1:1/0"


def answer(app: Flask, view: cabc.Callable[[], object], status: int = 200) -> None:
    """Make a request to a view."""
    app.add_url_rule("/page", "page", lambda: [view()] and ("", status))
    assert app.test_client().get("/page").status_code == status


@pytest.mark.parametrize("status", [200, 404])
def test_task_waits_for_success(celeries: Celeries, status: int) -> None:
    """A routed task goes to Celery once the request has succeeded, or is dropped."""
    app = celeries.make(CELERY=EAGER)

    def view() -> None:
        run_on_success(double, 4)
        assert tasks == []

    with record_tasks() as tasks:
        answer(app, view, status)

    (recorded,) = tasks
    assert (recorded.name, recorded.args) == ("report.double", (4,))
    how, result = ("celery", 8) if status == 200 else ("dropped", None)
    assert (recorded.how, recorded.result) == (how, result)


@pytest.mark.parametrize("where", ["request", "app"])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_task_waits_for_commit(celeries: Celeries, where: str, end: str) -> None:
    """A routed task goes to Celery at the commit, with a scope or without."""
    orm = pytest.importorskip("sqlalchemy.orm")
    app = celeries.make(CELERY=EAGER)
    context = app.test_request_context() if where == "request" else app.app_context()
    session = orm.Session()

    with record_tasks() as tasks, context:
        session.begin()
        run_on_commit(session, double, 4)
        assert tasks == []
        getattr(session, end)()

    (recorded,) = tasks
    how = "celery" if end == "commit" else "dropped"
    assert (recorded.how, recorded.args) == (how, (4,))


def test_arguments_are_checked_at_the_call(celeries: Celeries) -> None:
    """What JSON can't carry is a TypeError in the view, and the rest is as it was."""
    orm = pytest.importorskip("sqlalchemy.orm")
    app = celeries.make(CELERY=EAGER)
    untyped: t.Any = double
    values = [1]

    def view() -> None:
        for start in (run_on_success, lambda *a: run_on_commit(orm.Session(), *a)):
            with pytest.raises(TypeError, match="JSON can't carry its argument number"):
                start(untyped, (1, 2))

        run_on_success(untyped, values)
        values.append(2)

    with record_tasks() as tasks:
        answer(app, view)

    assert [(recorded.args, recorded.result) for recorded in tasks] == [
        (([1],), [1, 1])
    ]


@pytest.mark.parametrize("status", [200, 404])
def test_mail_waits_for_success(celeries: Celeries, redis: Broker, status: int) -> None:
    """Mail is published once the request has succeeded, and not at all if it fails."""
    queue = f"success-{status}"
    app = celeries.make(
        redis.url, CELERY={"task_default_queue": queue}, APITASK_MAIL_START="success"
    )

    with Redis(port=redis.port) as client:

        def view() -> None:
            mail.send(Message("One", ["ada@example.com"], "Hi."))

            with mail.connect() as connection:
                connection.send(Message("Two", ["ada@example.com"], "Hi."))
                connection.send(Message("Three", ["ada@example.com"], "Hi."))

            run(double, 4).result()
            assert client.llen(queue) == 1

        answer(app, view, status)
        assert client.llen(queue) == (4 if status == 200 else 1)


def test_mail_that_is_suppressed(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """In tests, the outbox has what would be sent, in order; it does not go away."""
    app = celeries.make(MAIL_SUPPRESS_SEND=True, APITASK_MAIL_START="success")
    subjects = [*map(str, range(20))]

    def view() -> None:
        for subject in subjects:
            mail.send(Message(subject, ["ada@example.com"], "Hi."))

        assert outbox == []

    with mail.record_messages() as outbox, record_tasks() as tasks:
        answer(app, view)

    assert [message.subject for message in outbox] == subjects
    assert {(recorded.name, recorded.how) for recorded in tasks} == {
        ("flask_mail.send", "thread")
    }
    assert not caplog.records


def test_record_in_order_of_the_calls(celeries: Celeries) -> None:
    """Eager tasks are recorded as they were started, not as Celery began them."""
    app = celeries.make(CELERY=EAGER)

    def view() -> None:
        run_on_success(double, 1)
        run(double, 2).result()
        assert [recorded.args for recorded in tasks] == [(2,)]

    with record_tasks() as tasks:
        answer(app, view)

    assert [(recorded.how, recorded.args) for recorded in tasks] == [
        ("celery", (1,)),
        ("celery", (2,)),
    ]


def test_record_without_a_broker(celeries: Celeries) -> None:
    """A task that the broker does not take is recorded where it ran."""
    app = celeries.make(NO_BROKER)

    with record_tasks() as tasks, app.test_request_context():
        result: t.Any = run(double, 4).result()
        assert isinstance(result, EagerResult)

    (recorded,) = tasks
    assert (recorded.how, recorded.args, recorded.result) == ("thread", (4,), 8)


def test_record_of_a_handover(celeries: Celeries, redis: Broker) -> None:
    """A task that the broker takes has not run here."""
    app = celeries.make(redis.url)

    with record_tasks() as tasks, app.test_request_context():
        result: t.Any = run(double, 4).result()
        assert not isinstance(result, EagerResult)
        assert isinstance(result, AsyncResult)

    assert tasks == []


def test_flask_mail_is_not_imported_for_flask_mailman() -> None:
    """A route for mail brings no Flask-Mail, which changes how mail is encoded."""
    pytest.importorskip("flask_mailman")
    code = (
        "import sys, flask_mailman\n"
        "from celery import Celery; from flask import Flask\n"
        "from flask_apitask import ApiTask\n"
        "app = Flask('shop')\n"
        "app.config['APITASK_MAIL_BACKGROUND'] = True\n"
        "app.config['APITASK_ROUTES'] = {'*': 'celery'}\n"
        "ApiTask(app)\n"
        "tasks = Celery('shop').tasks\n"
        "print('flask_mail' in sys.modules, 'flask_mailman.send' in tasks)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30
    )
    assert finished.stdout == "False True\n", finished.stderr
