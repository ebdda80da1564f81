from __future__ import annotations

import re
import typing as t

import flask_mail
import pytest
from flask import Flask
from mailbox_server import Mailbox

from flask_apitask import ApiTask
from flask_apitask import task_finished

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask.testing import FlaskClient

flask_mailman = pytest.importorskip("flask_mailman")
flask_security = pytest.importorskip("flask_security")
flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
fsqla_v3 = pytest.importorskip("flask_security.models.fsqla_v3")

EMAIL = "ann@example.org"
FIRST, SECOND, THIRD = "correct horse", "battery staple", "hunter twelve"
SUBJECTS = [
    "Welcome",
    "Password reset instructions",
    "Your password has been reset",
    "Your password has been changed",
]


class Answer(t.NamedTuple):
    """What the client gets to see of a step."""

    status: int
    location: str | None
    content: object


@pytest.fixture
def inbox() -> cabc.Iterator[Mailbox]:
    """Return a mail server that runs for the length of a test."""
    with Mailbox() as mailbox:
        yield mailbox


@pytest.fixture
def make_app(inbox: Mailbox) -> cabc.Iterator[cabc.Callable[..., Flask]]:
    """Return what makes an app with Flask-Security and a mail library."""
    databases: list[tuple[Flask, t.Any]] = []

    def factory(mail_class: t.Any, **config: t.Any) -> Flask:
        app = Flask(__name__)
        app.config.update(
            MAIL_SERVER="127.0.0.1",
            MAIL_PORT=inbox.port,
            MAIL_DEFAULT_SENDER="shop@example.org",
            APITASK_MAIL_KEEPALIVE=0,
            SECRET_KEY="secret",
            SECURITY_CHANGEABLE=True,
            SECURITY_CONFIRMABLE=True,
            # The default hash for tokens takes a second, on purpose.
            SECURITY_DEPRECATED_HASHING_SCHEMES=[],
            SECURITY_HASHING_SCHEMES=["hex_md5"],
            SECURITY_EMAIL_VALIDATOR_ARGS={"check_deliverability": False},
            SECURITY_PASSWORD_HASH="plaintext",
            SECURITY_PASSWORD_SALT="salt",
            SECURITY_RECOVERABLE=True,
            SECURITY_REGISTERABLE=True,
            SECURITY_USE_REGISTER_V2=True,
            SQLALCHEMY_DATABASE_URI="sqlite://",
            WTF_CSRF_ENABLED=False,
        )
        app.config.update(config)
        mail_class(app)
        ApiTask(app)
        db = flask_sqlalchemy.SQLAlchemy(app)
        fsqla_v3.FsModels.set_db_info(db)

        class Role(db.Model, fsqla_v3.FsRoleMixin):  # type: ignore[misc, name-defined]
            pass

        class User(db.Model, fsqla_v3.FsUserMixin):  # type: ignore[misc, name-defined]
            pass

        store = flask_security.SQLAlchemyUserDatastore(db, User, Role)
        flask_security.Security(app, store)

        with app.app_context():
            db.create_all()

        databases.append((app, db))
        return app

    yield factory

    # What pytest still holds must not hold the apps.
    while databases:
        app, db = databases.pop()

        with app.app_context():
            db.session.remove()
            db.engine.dispose()


def walk_through(
    client: FlaskClient, inbox: Mailbox, answer_first: bool = False
) -> list[Answer]:
    """Sign up, confirm, reset the password, change it, by the links in the mails.

    :param answer_first: Let the server take a mail once its request is answered.
    """
    answers: list[Answer] = []

    def post(url: str, **fields: str) -> None:
        # Closing the response is what waits, where the answer goes first.
        if answer_first:
            inbox.lock()

        with client.post(url, json=fields) as response:
            inbox.unlock()
            content = response.get_json()
            # The one thing that differs each time.
            content["response"].pop("csrf_token", None)
            answers.append(Answer(response.status_code, response.location, content))

    def link() -> str:
        text = inbox.messages[-1].get_body(["plain"])
        assert text is not None
        found = re.search(r"http://localhost(/\S+)", text.get_content())
        assert found
        return found[1]

    post("/register", email=EMAIL, password=FIRST, password_confirm=FIRST)
    confirmed = client.get(link())
    answers.append(Answer(confirmed.status_code, confirmed.location, None))
    post("/logout")
    post("/reset", email=EMAIL)
    post(link(), password=SECOND, password_confirm=SECOND)
    post("/logout")
    post("/login", email=EMAIL, password=SECOND)
    new = {"new_password": THIRD, "new_password_confirm": THIRD}
    post("/change", password=SECOND, **new)
    post("/logout")
    post("/login", email=EMAIL, password=SECOND)
    post("/login", email=EMAIL, password=THIRD)
    return answers


@pytest.mark.parametrize(
    ("wait", "start"),
    [("teardown", "send"), ("close", "send"), ("teardown", "success")],
)
@pytest.mark.parametrize("library", ["flask_mail", "flask_mailman"])
def test_flows_of_flask_security(
    make_app: cabc.Callable[..., Flask],
    inbox: Mailbox,
    library: str,
    wait: str,
    start: str,
) -> None:
    """Registration, confirmation, reset and change are as without us.

    The mails are sent by tasks of their requests, over each of the two libraries.
    """
    mail_class = {"flask_mail": flask_mail, "flask_mailman": flask_mailman}[
        library
    ].Mail
    without = make_app(mail_class)
    expected = walk_through(without.test_client(), inbox)
    sent = inbox.messages.copy()
    assert [message["Subject"] for message in sent] == SUBJECTS
    statuses = [answer.status for answer in expected]
    assert statuses == [200, 302, *[200] * 7, 400, 200]
    inbox.messages.clear()
    tasks: list[tuple[str, str]] = []

    def note(sender: Flask, name: str, how: str, **_: t.Any) -> None:
        tasks.append((name, how))

    config = {"APITASK_WAIT": wait, "APITASK_MAIL_START": start}
    app = make_app(mail_class, APITASK_MAIL_BACKGROUND=True, **config)

    with task_finished.connected_to(note, app):
        assert walk_through(app.test_client(), inbox, wait == "close") == expected

    assert tasks == [(f"{library}.send", "thread")] * len(SUBJECTS)
    assert inbox.subjects == SUBJECTS

    for now, before in zip(inbox.messages, sent, strict=True):
        kinds = [part.get_content_type() for part in now.walk()]
        assert kinds == [part.get_content_type() for part in before.walk()]
        assert now["To"] == before["To"] == EMAIL
        assert now["From"] == before["From"]
