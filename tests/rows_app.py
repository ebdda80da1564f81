"""The app under the ledger of rows: it writes one, and sends a mail if that worked."""

from __future__ import annotations

import enum
import os
import typing as t

from flask import Flask
from flask_mail import Mail
from flask_mail import Message
from flask_sqlalchemy import SQLAlchemy
from ledger import message_id
from ledger import sign
from sqlalchemy import exc
from sqlalchemy import orm

from flask_apitask import ApiTask
from flask_apitask import run_on_commit

if t.TYPE_CHECKING:
    from flask.typing import ResponseReturnValue


class Base(orm.DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"

    number: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(unique=True)


class Way(enum.IntEnum):
    """What becomes of a request, by the remainder of its number."""

    COMMIT = 0
    FAIL = 1
    # The database refuses it.
    COMMIT_IN_VAIN = 2
    COMMIT_AND_FAIL = 3
    ROLL_BACK = 4


# A name that a row has already.
TAKEN: t.Final = "taken"


def way_of(number: int) -> Way:
    """Return what becomes of a request."""
    return Way(number % len(Way))


def create_app() -> Flask:
    """Make the app; ``FLASK_...`` variables configure it.

    ``LEDGER_MAIL`` says what a mail waits for, ``"success"`` or ``"commit"``.
    """
    app = Flask(__name__)
    app.config.update(
        MAIL_SERVER="127.0.0.1",
        MAIL_DEFAULT_SENDER="app@ledger.example",
        APITASK_MAIL_BACKGROUND=True,
    )
    app.config.from_prefixed_env()
    on_commit = app.config["LEDGER_MAIL"] == "commit"
    app.config["APITASK_MAIL_START"] = "send" if on_commit else "success"
    db, mail = SQLAlchemy(app), Mail(app)
    ApiTask(app)
    begun = os.open(app.config["LEDGER_BEGUN"], os.O_WRONLY | os.O_APPEND)

    def send(number: int) -> None:
        message = Message(f"Row {number}", ["client@ledger.example"], "It is in.")
        message.msgId = message_id(number, 0)
        mail.send(message)

    @app.post("/<int:number>")
    def order(number: int) -> ResponseReturnValue:
        os.write(begun, f"{number} {os.getpid()}\n".encode())
        way = way_of(number)
        name = TAKEN if way is Way.COMMIT_IN_VAIN else str(number)
        db.session.add(Row(number=number, name=name))

        # Before anybody knows, as careless code does.
        if on_commit:
            run_on_commit(db.session, send, number)
        else:
            send(number)

        if way is Way.FAIL:
            raise ValueError

        if way is Way.ROLL_BACK:
            db.session.rollback()
            # A success, but not of the row.
            return sign(app.config["SECRET_KEY"], number), 200 if on_commit else 409

        try:
            db.session.commit()
        except exc.IntegrityError:
            return "taken", 409

        if way is Way.COMMIT_AND_FAIL:
            raise ValueError

        return sign(app.config["SECRET_KEY"], number)

    return app


if __name__ != "__main__" and "FLASK_LEDGER_BEGUN" in os.environ:
    app = create_app()
