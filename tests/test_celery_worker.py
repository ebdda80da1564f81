"""Tasks and mail in real workers of Celery, over real brokers."""

from __future__ import annotations

import email
import json
import smtplib
import typing as t
import uuid

import flask_mailman  # type: ignore[import-untyped]
import pytest
from conftest import wait_until
from example import Example
from example import fetch
from example import read_audit
from example import WAYS
from flask_mail import email_dispatched
from flask_mail import Message
from smtp_servers import Fault
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import run

pytest.importorskip("celery")
pytest.importorskip("redis")

from brokers import find_port
from brokers import Worker
from celery_app import describe
from celery_app import double
from celery_app import fail
from celery_app import mail
from celery_app import mailman
from celery_app import wait

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from brokers import Broker
    from celery_app import Celeries
    from flask import Flask

# Seconds after which a worker that does not answer has failed.
PATIENCE = 30.0
LIBRARIES = ["flask_mail", "flask_mailman"]


class Setting(t.NamedTuple):
    """A worker, and what the app has to know of it."""

    worker: Worker
    server: ScriptedServer
    config: dict[str, t.Any]


@pytest.fixture(
    scope="module",
    # The ledger has the other pool of RabbitMQ.
    params=["redis-prefork", "rabbitmq-threads"],
)
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> cabc.Iterator[Setting]:
    """Run a worker on each broker, one of each pool, and a mail server."""
    name, pool = request.param.split("-")
    broker: Broker = request.getfixturevalue(name)
    folder = tmp_path_factory.mktemp("worker")
    results = folder / "results"
    results.mkdir()
    # RabbitMQ stores no results.
    celery = {"broker_url": broker.url, "result_backend": f"file://{results}"}
    celery |= {"task_default_queue": f"{name}-{pool}"}

    with ScriptedServer() as server:
        config: dict[str, t.Any] = {
            "CELERY": celery,
            "MAIL_PORT": server.port,
            "APITASK_CELERY_MAIL_BACKOFF": 0.01,
            "APITASK_CELERY_MAIL_RETRIES": 2,
        }
        variables = {f"FLASK_{key}": json.dumps(value) for key, value in config.items()}

        with Worker(folder, "celery_worker:celery_app", pool, variables) as worker:
            yield Setting(worker, server, config)


@pytest.fixture
def web(setting: Setting, celeries: Celeries) -> cabc.Iterator[Flask]:
    """Make the app of the web process, and have the mail server forget it."""
    server = setting.server
    yield celeries.make(**setting.config)
    server.hang_up()

    with server.changed:
        server.taken.clear()
        server.commands.clear()
        server.connects = 0


def get(future: t.Any) -> t.Any:
    """Return what a task has returned in the worker."""
    return future.result(PATIENCE).get(timeout=PATIENCE, interval=0.02)


def send(
    app: Flask, *recipients: str, subject: str = "Hello", library: str = "flask_mail"
) -> str:
    """Send a mail in a request, and return its Message-ID."""
    if library == "flask_mailman":
        return send_by_mailman(app, *recipients)

    with app.test_request_context():
        message = Message(subject, body="Hi.")

        for name in recipients:
            message.add_recipient(f"{name}@example.com")

        mail.send(message)

    return str(message.msgId)


def send_by_mailman(app: Flask, *recipients: str, fail_silently: bool = False) -> str:
    """Send a mail with Flask-Mailman."""
    message_id = f"<{uuid.uuid4()}@celery.example>"

    with app.test_request_context():
        message = flask_mailman.EmailMessage("Hello", "Hi.")
        message.to = [f"{name}@example.com" for name in recipients]
        message.extra_headers["Message-ID"] = message_id
        assert message.send(fail_silently) == 1

    return message_id


def taken_ids(server: ScriptedServer) -> list[str]:
    """Return the Message-IDs of what the server took."""
    parsed = [email.message_from_bytes(taken.content) for taken in server.taken]
    return [message["Message-ID"] for message in parsed]


def attempts(server: ScriptedServer) -> list[list[str]]:
    """Return whom each attempt of a mail was for."""
    found: list[list[str]] = []

    for command in server.commands:
        if command.startswith("MAIL"):
            found.append([])
        elif command.startswith("RCPT"):
            found[-1].append(command.partition("<")[2].partition("@")[0])

    return found


def errors(setting: Setting, text: str) -> int:
    """Return how many ERRORs with a text the worker's log has."""
    records = setting.worker.output().split("\n[")
    return sum("ERROR" in record and text in record for record in records)


def test_worker_knows_the_names(web: Flask) -> None:
    """What is routed is registered in a worker under the name that it has."""
    inspect = web.extensions["celery"].control.inspect(timeout=PATIENCE, limit=1)
    (registered,) = inspect.registered().values()
    mails = {f"{library}.send" for library in LIBRARIES}
    assert {"report.double", "report.fail", *mails} <= set(registered)


def test_result_of_a_worker(web: Flask) -> None:
    """The AsyncResult in the future gets what the worker returns."""
    with web.test_request_context():
        assert get(run(double, 4)) == 8
        assert get(run(wait)) == "waited"

    with web.app_context():
        assert get(run(double, 5)) == 10


def test_context_in_a_worker(web: Flask) -> None:
    """A task has one app context in a worker, and what it starts is a plain call."""
    expected = {"app": web.name, "pushed": 1, "inner": web.name}

    with web.test_request_context():
        assert get(run(describe)) == {**expected, "inner_how": ["inline"]}


def test_failure_in_a_worker(web: Flask, setting: Setting) -> None:
    """A task that fails in a worker is one ERROR in its log, and in the result."""
    with web.test_request_context():
        result: t.Any = run(fail, "it is lost").result(PATIENCE)

    with pytest.raises(LookupError, match="it is lost"):
        result.get(timeout=PATIENCE, interval=0.02)

    assert "Task 'report.fail' failed after " in setting.worker.output()
    # Celery's own record is not a second ERROR.
    assert errors(setting, "report.fail") == 1


def test_worker_refuses_pickle(web: Flask, setting: Setting) -> None:
    """A worker unpickles no message, whoever wrote it."""
    task = web.extensions["celery"].tasks["report.double"]
    task.apply_async((3,), serializer="pickle")
    wait_until(lambda: "ContentDisallowed" in setting.worker.output(), PATIENCE)

    with web.test_request_context():
        assert get(run(double, 4)) == 8


def test_mail_of_a_worker(web: Flask, setting: Setting) -> None:
    """A worker sends what Flask-Mail was given, to whom, over a kept connection."""
    server = setting.server
    told: list[str] = []

    def listen(app: Flask, message: Message, **extra: object) -> None:
        told.append(str(message.subject))

    with email_dispatched.connected_to(listen):
        ids = [send(web, "ada", "bob", subject=f"Größe {n}") for n in range(6)]

    assert told == [f"Größe {n}" for n in range(6)]
    server.wait_for(lambda: len(server.taken) == 6)
    assert sorted(taken_ids(server)) == sorted(ids)
    recipients = {tuple(sorted(taken.recipients)) for taken in server.taken}
    assert recipients == {("ada@example.com", "bob@example.com")}
    # There are two processes, or threads.
    assert server.connects <= 2


def test_mail_of_flask_mailman(web: Flask, setting: Setting) -> None:
    """A worker sends single messages, those of one call and those of a block."""
    server = setting.server

    with web.test_request_context():
        assert mailman.send_mail("0", "Hi.", None, ["ada@example.com"]) == 1
        letters = [(f"{n}", "Hi.", None, ["ada@example.com"]) for n in (1, 2)]
        assert mailman.send_mass_mail(letters) == 2

        with mailman.get_connection() as connection:
            for number in (3, 4):
                message = flask_mailman.EmailMessage(f"{number}", "Hi.")
                message.to, message.connection = ["ada@example.com"], connection
                assert message.send() == 1

    server.wait_for(lambda: len(server.taken) == 5)
    found = [email.message_from_bytes(taken.content) for taken in server.taken]
    assert sorted(message["Subject"] for message in found) == [*"01234"]
    assert server.connects <= 2
    done = "Task flask_mailman.send["
    wait_until(lambda: setting.worker.output().count(done) == 2 * 5, PATIENCE)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        (Stage.MAIL, Fault.TEMPORARY),
        (Stage.DATA, Fault.TEMPORARY),
        (Stage.DOT, Fault.TEMPORARY),
        (Stage.MAIL, Fault.BUSY),
        (Stage.MAIL, Fault.DROP),
    ],
)
def test_mail_is_tried_again(
    web: Flask, setting: Setting, stage: Stage, fault: Fault, library: str
) -> None:
    """A mail that the server refuses for now is sent later, as the same message."""
    server = setting.server
    server.fail(stage, fault, fault)
    message_id = send(web, "ada", library=library)
    server.wait_for(lambda: len(server.taken) == 1)
    assert taken_ids(server) == [message_id]
    assert len(attempts(server)) == 3
    assert errors(setting, message_id) == 0


def test_mail_is_given_up(web: Flask, setting: Setting) -> None:
    """After the last attempt there is one ERROR."""
    server = setting.server
    server.fail(Stage.DATA, *[Fault.TEMPORARY] * 3)
    message_id = send(web, "ada")
    wait_until(lambda: errors(setting, message_id) > 0, PATIENCE)
    assert len(attempts(server)) == 3
    assert errors(setting, message_id) == 1
    assert not server.taken


@pytest.mark.parametrize(
    ("stage", "fault"), [(Stage.MAIL, Fault.PERMANENT), (Stage.DOT, Fault.DROP)]
)
def test_mail_is_not_tried_again(
    web: Flask, setting: Setting, stage: Stage, fault: Fault
) -> None:
    """A mail that is refused for good, or may be delivered, is one ERROR at once."""
    server = setting.server
    server.fail(stage, fault)
    message_id = send(web, "ada")
    wait_until(lambda: errors(setting, message_id) > 0, PATIENCE)
    send(web, "bob")
    server.wait_for(
        lambda: ("bob@example.com",) in [m.recipients for m in server.taken]
    )
    assert attempts(server).count(["ada"]) == 1
    assert errors(setting, message_id) == 1


def test_mail_fails_silently(web: Flask, setting: Setting) -> None:
    """Flask-Mailman's mail with ``fail_silently`` is tried again, with no ERROR."""
    server = setting.server
    server.fail(Stage.MAIL, Fault.TEMPORARY, Fault.PERMANENT)
    message_id = send_by_mailman(web, "ada", fail_silently=True)
    text = "A mail was not delivered (fail_silently is on): "
    wait_until(lambda: text in setting.worker.output(), PATIENCE)
    assert attempts(server) == [["ada"]] * 2
    assert errors(setting, message_id) == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_recipients_are_tried_again_alone(
    web: Flask, setting: Setting, library: str
) -> None:
    """A retry for some recipients does not go to those who have the message already."""
    server = setting.server
    server.fail(Stage.RCPT, None, Fault.TEMPORARY, Fault.PERMANENT)
    message_id = send(web, "ada", "bob", "eve", library=library)
    server.wait_for(lambda: len(server.taken) == 2)
    first, second = attempts(server)
    assert second == first[1:2]
    assert taken_ids(server) == [message_id] * 2
    wait_until(lambda: errors(setting, message_id) > 0, PATIENCE)
    assert errors(setting, message_id) == 1
    assert "1 of 3 recipients were refused for good: " in setting.worker.output()


def test_addresses_are_not_shown(web: Flask, setting: Setting) -> None:
    """A worker's log has no address of a mail that worked, or did not."""
    setting.server.fail(Stage.MAIL, Fault.TEMPORARY, Fault.PERMANENT)
    message_id = send(web, "grace")
    wait_until(lambda: errors(setting, message_id) > 0, PATIENCE)
    assert "grace" not in setting.worker.output()


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize("library", LIBRARIES)
def test_mail_that_is_too_large(
    setting: Setting, celeries: Celeries, library: str
) -> None:
    """A mail above the limit is sent by its request."""
    server = setting.server
    app = celeries.make(**setting.config, APITASK_CELERY_MAIL_SIZE=10)
    message_id = send(app, "ada", library=library)
    assert taken_ids(server) == [message_id]


@pytest.mark.usefixtures("web")
def test_mail_without_a_broker(setting: Setting, celeries: Celeries) -> None:
    """Without its broker, an app sends its mail as if there were no route."""
    server = setting.server
    celery = {"broker_url": "redis://127.0.0.1:1/0"}
    app = celeries.make(**{**setting.config, "CELERY": celery})
    ids = [send(app, "ada"), send(app, "bob")]
    assert taken_ids(server) == ids

    # Without a request, errors are for the caller.
    server.fail(Stage.MAIL, Fault.PERMANENT)

    with app.app_context(), pytest.raises(smtplib.SMTPException, match="refused"):
        mail.send(Message("Hello", ["ada@example.com"], "Hi."))


def test_mail_of_a_command(web: Flask, setting: Setting) -> None:
    """Outside of a request, a mail goes to Celery; in a task it is sent at once."""
    server = setting.server

    with web.app_context():
        mail.send(Message("Hello", ["ada@example.com"], "Hi."))
        server.wait_for(lambda: len(server.taken) == 1)
        connects = server.connects

    def task() -> int:
        mail.send(Message("Hello", ["bob@example.com"], "Hi."))
        return len(server.taken)

    with web.test_request_context():
        assert run(task).result(PATIENCE) == 2

    assert server.connects == connects + 1


def test_worker_of_the_example(broker: Broker, tmp_path: pathlib.Path) -> None:
    """With a broker, a worker sends the mails and writes the audit of the example."""
    database = tmp_path / "signup.sqlite"
    environ = {
        "FLASK_BROKER": broker.url,
        "FLASK_DATABASE": str(database),
        "FLASK_MAIL_PORT": f"{find_port()}",
    }

    with Example(**environ) as example:
        url = example.address()

        for way in WAYS:
            answer = fetch(f"{url}/{way}/signup", {"address": f"{way}@example.org"})
            assert answer.status == 201

        # There is no worker yet, so only plain Flask-Mail's sign-up has its audit.
        assert [address for address, _ in read_audit(database)] == ["plain@example.org"]
        # A task that was handed over has no bar.
        bars = fetch(url).way("background").bars
        assert [bar.name for bar in bars] == ["View", "Wait"]

        with Worker(tmp_path, "example_app:celery", "prefork", environ) as worker:
            wait_until(lambda: len(read_audit(database)) == 3, PATIENCE)
            wait_until(lambda: len(fetch(url).mails) == 6, PATIENCE)
            assert "Task signup.audit[" in worker.output()

    assert "WARNING in" not in example.output
