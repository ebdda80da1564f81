"""What a worker does with a mail that can't be sent, called as Celery calls it."""

from __future__ import annotations

import base64
import ssl
import typing as t

import pytest
from mail_time import unhurried
from smtp_servers import Certificates
from smtp_servers import Fault
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import DeliveryError

pytest.importorskip("celery")

from celery.exceptions import Reject
from celery.exceptions import Retry
from celery_app import mail
from celery_app import mailman
from flask_mail import email_dispatched
from flask_mail import Message

if t.TYPE_CHECKING:
    import pathlib

    from celery_app import Celeries
    from flask import Flask

NO_BROKER = "redis://127.0.0.1:1/0"
CONTENT = b"Message-ID: <1@celery.example>\n\nHello.\n"


def work(
    app: Flask,
    *recipients: str,
    sender: str = "app@celery.example",
    name: str = "flask_mail.send",
    **request: t.Any,
) -> None:
    """Do what a worker does with a mail."""
    task = app.extensions["celery"].tasks[name]
    plain = {"id": "1", "retries": 0, "is_eager": False, "called_directly": False}
    task.push_request(**plain, **request)

    try:
        task.run(
            sender=sender,
            recipients=list(recipients),
            content=base64.b64encode(CONTENT).decode(),
            message_id="<1@celery.example>",
            mail_options=[],
            rcpt_options=[],
        )
    finally:
        task.pop_request()


def find_errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the ERRORs of mail."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "ERROR" and "flask_mail.send" in record.getMessage()
    ]


def test_retry_without_a_broker(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """A mail that can't be published again stays with the broker that it came from."""
    with ScriptedServer() as server:
        app = celeries.make(NO_BROKER, MAIL_PORT=server.port)
        server.fail(Stage.DATA, Fault.TEMPORARY)

        with pytest.raises(Reject) as caught:
            work(app, "ada@example.com")

        app.extensions.pop("apitask_mail")

    assert caught.value.requeue
    assert not find_errors(caplog)


def test_retry_is_of_the_same_family(celeries: Celeries) -> None:
    """A mail that is tried again keeps its place in a workflow, and its priority."""
    family = {"root_id": "first", "parent_id": "second"}
    delivery_info = {"priority": 5}

    with ScriptedServer() as server:
        celery = {"task_default_queue": "family"}
        app = celeries.make(CELERY=celery, MAIL_PORT=server.port)
        server.fail(Stage.DATA, Fault.TEMPORARY, Fault.TEMPORARY)

        # Over a new connection to the broker, and over that connection again.
        for _ in range(2):
            with pytest.raises(Retry):
                work(app, "ada@example.com", **family, delivery_info=delivery_info)

        app.extensions.pop("apitask_mail")

    with app.extensions["celery"].connection_for_read() as connection:
        queue = connection.SimpleQueue("family")

        for _ in range(2):
            message = queue.get(block=False)
            message.ack()
            assert family.items() <= message.headers.items()
            assert message.properties["priority"] == 5

        queue.close()


def test_retry_for_some_without_a_broker(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """A mail that some recipients have is not sent to all again: it is an ERROR."""
    with ScriptedServer() as server:
        app = celeries.make(NO_BROKER, MAIL_PORT=server.port)
        server.fail(Stage.RCPT, None, Fault.TEMPORARY)

        with pytest.raises(DeliveryError) as caught:
            work(app, "ada@example.com", "bob@example.com")

        app.extensions.pop("apitask_mail")

    assert caught.value.recipients.keys() == {"bob@example.com"}
    assert len(find_errors(caplog)) == 1


def test_certificate_that_is_refused(
    celeries: Celeries, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is not the right one is not tried again."""
    certificate = Certificates(tmp_path).context("localhost")

    with ScriptedServer(tls=certificate) as server:
        app = celeries.make(NO_BROKER, MAIL_PORT=server.port, MAIL_USE_TLS=True)

        with pytest.raises(DeliveryError, match="could not be verified"):
            work(app, "ada@example.com")

    assert len(find_errors(caplog)) == 1


def test_mail_that_is_no_mail(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """Something that others published, and that is not a mail, is an ERROR."""
    app = celeries.make(NO_BROKER)

    with pytest.raises(ValueError, match="has a line break"):
        work(app, "ada@example.com", sender="app@celery.example\r\nDATA")

    assert len(find_errors(caplog)) == 1


def test_worker_that_suppresses_mail(celeries: Celeries) -> None:
    """A worker that is told to send nothing sends nothing."""
    app = celeries.make(NO_BROKER, MAIL_SUPPRESS_SEND=True, MAIL_PORT=1)
    work(app, "ada@example.com")


@pytest.mark.parametrize("raises", [False, True])
def test_mail_in_eager_mode(
    celeries: Celeries, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    """With ``task_always_eager``, a mail is sent at once, and is not tried again."""
    eager = {"task_always_eager": True, "task_eager_propagates": raises}

    with ScriptedServer() as server:
        app = celeries.make(NO_BROKER, CELERY=eager, MAIL_PORT=server.port)
        server.fail(Stage.DATA, None, Fault.TEMPORARY)

        for _ in range(2):
            assert app.test_client().post("/mail/ada").text == "sent"

        app.extensions.pop("apitask_mail")
        assert len(server.taken) == 1

    assert len(find_errors(caplog)) == 1


def test_block_in_eager_mode(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """A mail that fails does not stop the others of its block, and is not announced."""
    told: list[str] = []

    with ScriptedServer() as server:
        app = celeries.make(
            NO_BROKER,
            CELERY={"task_always_eager": True},
            APITASK_PROPAGATE=True,
            APITASK_CELERY_MAIL_SIZE=2000,
            MAIL_PORT=server.port,
        )
        server.fail(Stage.RCPT, None, Fault.PERMANENT, None, Fault.PERMANENT)

        @app.get("/")
        def view() -> str:
            with mail.connect() as connection:
                # The one that is too large is sent last.
                for text in ("1", "2", 4000 * "3", "4"):
                    connection.send(Message(text[0], ["ada@example.com"], text))

            return "sent"

        def tell(app: Flask, message: Message) -> None:
            told.append(str(message.subject))

        with (
            email_dispatched.connected_to(tell),
            pytest.raises(DeliveryError, match="2 of 4 messages were not delivered"),
        ):
            app.test_client().get("/")

        app.extensions.pop("apitask_mail")
        assert len(server.taken) == 2

    assert told == ["1", "4"]
    assert len(find_errors(caplog)) == 1


def test_settings_of_flask_mailman(celeries: Celeries, tmp_path: pathlib.Path) -> None:
    """A worker sends Flask-Mailman's mail with the keys that only it has."""
    certificates = Certificates(tmp_path)
    issued = certificates.authority.issue_cert("worker.example")
    certfile, keyfile = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(certfile)
    issued.private_key_pem.write_to_path(keyfile)
    context = certificates.context("127.0.0.1")
    context.load_verify_locations(certificates.cafile)
    context.verify_mode = ssl.CERT_REQUIRED

    with ScriptedServer(tls=context) as server:
        app = celeries.make(
            NO_BROKER,
            APITASK_MAIL_TLS_VERIFY=certificates.cafile,
            APITASK_CELERY_MAIL_RETRIES=0,
            MAIL_PORT=server.port,
            MAIL_USE_TLS=True,
            MAIL_TIMEOUT=20.0,
            MAIL_SSL_CERTFILE=certfile,
            MAIL_SSL_KEYFILE=keyfile,
        )
        work(app, "ada@example.com", name="flask_mailman.send")
        assert len(server.taken) == 1
        server.hang_up()
        server.fail(Stage.GREETING, Fault.SILENCE)

        with (
            unhurried(server),
            pytest.raises(DeliveryError, match=r"more than 20 s \(MAIL_TIMEOUT\)"),
        ):
            work(app, "ada@example.com", name="flask_mailman.send")

        # Flask-Mail has no key for a certificate.
        with pytest.raises(DeliveryError):
            work(app, "ada@example.com")

        app.extensions.pop("apitask_mail")


def test_connection_with_settings_of_its_own(
    celeries: Celeries, caplog: pytest.LogCaptureFixture
) -> None:
    """Only mail that is sent with the app's settings goes to a worker."""
    with ScriptedServer() as server:
        app = celeries.make(NO_BROKER, MAIL_PORT=server.port)

        for warnings, options in enumerate([{"host": "localhost"}, {}]):
            with app.test_request_context():
                connection = mailman.get_connection(**options)
                mailman.send_mail(
                    "x", "x", None, ["ada@example.com"], connection=connection
                )

            # A WARNING reports that the broker is down.
            assert len(caplog.records) == warnings

        app.extensions.pop("apitask_mail")
        assert len(server.taken) == 2


@pytest.mark.parametrize("change", [{"MAIL_SERVER": ""}, {"MAIL_PORT": "none"}])
def test_settings_that_only_a_connection_has(
    celeries: Celeries, change: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Mail does not need settings of the app that it is not sent with."""
    with ScriptedServer() as server:
        app = celeries.make(NO_BROKER)
        app.config.update(change)
        mailman.init_app(app)
        own = {"host": "localhost", "port": server.port}

        with app.test_request_context():
            connection = mailman.get_connection(**own)
            mailman.send_mail(
                "x", "x", None, ["ada@example.com"], connection=connection
            )

        app.extensions.pop("apitask_mail")
        assert len(server.taken) == 1

    assert not caplog.records


@pytest.mark.parametrize("library", [mail, mailman])
def test_settings_that_are_changed(
    celeries: Celeries, library: t.Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Mail of an account that a worker does not have is sent here: one WARNING."""
    with ScriptedServer() as server:
        app = celeries.make(NO_BROKER, MAIL_PORT=server.port)
        name = "mail" if library is mail else "mailman"
        # That is none of those settings, and app.run() sets it late.
        app.debug = True

        for host in ("localhost", "localhost", "127.0.0.1"):
            app.extensions[name].server = host

            with app.test_request_context():
                if library is mail:
                    mail.send(Message("x", ["ada@example.com"], "x"))
                else:
                    mailman.send_mail("x", "x", None, ["ada@example.com"])

        app.extensions.pop("apitask_mail")
        assert len(server.taken) == 3

    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    texts = [record.getMessage() for record in warned]
    # The second one is about the broker.
    assert [text.split()[0] for text in texts] == ["The", "Celery's"]
    assert f"app.extensions['{name}'] are not those of app.config" in texts[0]


def test_mail_without_a_scope(celeries: Celeries) -> None:
    """A mail that neither the broker nor the server takes is an error of its own."""
    app = celeries.make(NO_BROKER, MAIL_PORT=1)
    letter = "x", "x", None, ["ada@example.com"]

    with app.app_context():
        assert mailman.send_mail(*letter, fail_silently=True) == 0

        with pytest.raises(DeliveryError):
            mailman.send_mail(*letter)

        with mail.connect() as connection, pytest.raises(DeliveryError):
            connection.send(Message("x", ["ada@example.com"], "x"))

    app.extensions.pop("apitask_mail")


@pytest.mark.parametrize("missing", ["mailman", "apitask_mail"])
def test_worker_without_a_mail_library(
    celeries: Celeries, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker whose app sends no such mail says what it needs."""
    app = celeries.make(NO_BROKER)
    del app.extensions[missing]

    with pytest.raises(RuntimeError, match=rf"no app\.extensions\['{missing}'\]\. Set"):
        work(app, "ada@example.com", name="flask_mailman.send")

    (record,) = caplog.records
    assert record.getMessage().startswith("Task 'flask_mailman.send' failed after")
