from __future__ import annotations

import contextlib
import logging
import threading
import typing as t

import flask_mail
import pytest
from flask import Flask
from flask_mail import BadHeaderError
from flask_mail import Mail
from flask_mail import Message
from mailbox_server import Mailbox

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import run_on_success
from flask_apitask.mail import sending
from flask_apitask.testing import record_tasks

if t.TYPE_CHECKING:
    import collections.abc as cabc


class Site:
    """An app whose mail waits for the success of the request.

    :param port: Where the mail goes; ``None`` if it is not sent, as in tests.
    """

    def __init__(self, port: int | None, **config: t.Any) -> None:
        self.app = Flask(__name__)
        self.app.config.update(
            APITASK_MAIL_BACKGROUND=True,
            APITASK_MAIL_START="success",
            MAIL_DEFAULT_SENDER="shop@example.org",
            MAIL_PORT=port,
            MAIL_SUPPRESS_SEND=port is None,
        )
        self.app.config.update(config)
        self.mail = Mail(self.app)
        ApiTask(self.app)

    def get(self, view: cabc.Callable[[], object], status: int = 200) -> None:
        """Make a request to a view."""
        self.app.add_url_rule("/", "page", lambda: [view()] and ("", status))
        response = self.app.test_client().get("/", buffered=True)
        assert response.status_code == status

    def message(self, number: int = 0) -> Message:
        """Make a message."""
        return Message(str(number), [f"{number}@example.org"], body="text")


@pytest.fixture
def inbox() -> cabc.Iterator[Mailbox]:
    """Return a mail server that runs for the length of a test."""
    with Mailbox() as mailbox:
        yield mailbox


@pytest.mark.parametrize("end", ["teardown", "close"])
@pytest.mark.parametrize("status", [200, 302, 400, 503])
def test_mail_of_a_request(
    inbox: Mailbox, caplog: pytest.LogCaptureFixture, end: str, status: int
) -> None:
    """Mail is delivered if the request has succeeded, and else dropped with an INFO."""
    site = Site(inbox.port, APITASK_WAIT=end)
    caplog.set_level(logging.INFO)

    def view() -> None:
        site.mail.send(site.message(1))

        with site.mail.connect() as connection:
            connection.send(site.message(2))
            connection.send(site.message(3))

        run(lambda: site.mail.send(site.message(4))).result()
        assert inbox.subjects == []

    site.get(view, status)
    assert len(inbox.subjects) == (4 if status < 400 else 0)
    dropped = [r.getMessage() for r in caplog.records if "drop" in r.getMessage()]
    assert dropped == (
        []
        if status < 400
        else 3
        * [
            f"Task 'flask_mail.send' of GET / was dropped: the response has the status"
            f" {status}."
        ]
    )


def test_mail_is_checked_and_rendered_at_the_call(inbox: Mailbox) -> None:
    """What can't be sent raises in the view, and what is sent is as it was there."""
    site = Site(inbox.port)

    def view() -> None:
        message = site.message(1)
        site.mail.send(message)
        message.subject = "changed"

        with pytest.raises(AssertionError, match="recipients"):
            site.mail.send(Message("none", []))

        with pytest.raises(BadHeaderError):
            site.mail.send(Message("a\nb", ["ada@example.org"]))

    site.get(view)
    assert inbox.subjects == ["1"]


def test_large_blocks_are_held(inbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that would begin to deliver while it is open does not."""
    monkeypatch.setattr(sending, "BATCH", 1)
    site = Site(inbox.port)

    def view() -> None:
        with site.mail.connect() as connection:
            connection.send(site.message(1))
            connection.send(site.message(2))

        assert inbox.subjects == []

    with record_tasks() as tasks:
        site.get(view)

    assert inbox.subjects == ["1", "2"]
    # All of it goes over one connection.
    assert len(tasks) == 1


def test_order_of_mail_that_is_not_sent() -> None:
    """A message is told of after those before it, however long that takes."""
    site, other = Site(None), threading.Event()
    told: list[str] = []

    def receive(app: Flask, message: Message, **extra: object) -> None:
        if message.subject == "0":
            # It does not come while this is under way.
            assert not other.wait(0.1)
        else:
            other.set()

        told.append(message.subject)

    def view() -> None:
        for number in range(3):
            site.mail.send(site.message(number))

    with flask_mail.email_dispatched.connected_to(receive, site.app):
        site.get(view)

    assert told == ["0", "1", "2"]


def test_mail_that_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    """In tests, Flask-Mail's outbox has what would be sent, and in order."""
    site = Site(None)
    caplog.set_level(logging.INFO)
    numbers = range(20)

    def view() -> None:
        for number in numbers:
            site.mail.send(site.message(number))

        assert outbox == []

    def fail_late() -> str:
        view()
        raise ZeroDivisionError

    with site.mail.record_messages() as outbox:
        site.get(view)
        assert [message.subject for message in outbox] == [*map(str, numbers)]

        with site.app.app_context():
            site.mail.send(site.message(99))
            assert outbox.pop().subject == "99"

    with site.mail.record_messages() as outbox:
        site.app.view_functions["page"] = fail_late
        assert site.app.test_client().get("/").status_code == 500
        assert outbox == []

    assert len([r for r in caplog.records if "was dropped" in r.getMessage()]) == 20


def test_without_scope_and_in_blocks(inbox: Mailbox) -> None:
    """Without a scope mail is sent at once; in a block, when that has succeeded."""
    site = Site(inbox.port)

    with site.app.app_context():
        site.mail.send(site.message(1))
        assert inbox.subjects == ["1"]

        with open_scope():
            site.mail.send(site.message(2))
            assert inbox.subjects == ["1"]

        assert inbox.subjects == ["1", "2"]

        with contextlib.suppress(ZeroDivisionError), open_scope():
            site.mail.send(site.message(3))
            raise ZeroDivisionError

    assert inbox.subjects == ["1", "2"]


def test_mail_of_a_task_that_was_put_off(inbox: Mailbox) -> None:
    """Once the request has succeeded, a task sends its mail itself, and at once."""
    site = Site(inbox.port)
    seen: list[list[str]] = []

    def send_later() -> None:
        site.mail.send(site.message(1))
        seen.append(inbox.subjects)

    site.get(lambda: run_on_success(send_later))
    assert seen == [["1"]]


def test_suppressed_mail_of_a_task_that_was_put_off() -> None:
    """Such a task tells of its mail at once, whatever waits for its own thread."""
    site = Site(None, APITASK_MAX_WORKERS=1, APITASK_TIMEOUT=5.0)

    def view() -> None:
        run_on_success(site.mail.send, site.message(1))
        site.mail.send(site.message(2))

    with site.mail.record_messages() as outbox:
        site.get(view)

    assert [message.subject for message in outbox] == ["1", "2"]


@pytest.mark.parametrize("status", [200, 404])
def test_changed_flask_mail(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Code in place of Flask-Mail's waits for success as well."""
    sent: list[str] = []
    site = Site(25)

    def send(self: t.Any, message: flask_mail.Message) -> None:
        sent.append(message.subject)

    monkeypatch.setattr(Mail, "send", send)

    def view() -> None:
        site.mail.send(site.message(1))
        assert sent == []

    site.get(view, status)
    assert sent == (["1"] if status == 200 else [])
