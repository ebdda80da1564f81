"""The app under the ledger: every request sends two mails with its number."""

from __future__ import annotations

import os
import threading
import typing as t

from flask import Flask
from flask_executor import Executor  # type: ignore[import-untyped]
from flask_mail import Mail
from flask_mail import Message
from ledger import COPIES
from ledger import message_id
from ledger import sign

from flask_apitask import ApiTask

if t.TYPE_CHECKING:
    import collections.abc as cabc


def create_app() -> Flask:
    """Make the app; ``FLASK_...`` variables configure it.

    ``LEDGER_MAIL`` names who sends: ``"apitask"``, ``"celery"`` for a worker that it
    hands the mail over to, or one that is not waited for: ``"thread"`` for one thread
    per mail, ``"executor"`` for the pool of Flask-Executor.
    """
    app = Flask(__name__)
    app.config.update(MAIL_SERVER="127.0.0.1", MAIL_DEFAULT_SENDER="app@ledger.example")
    app.config.from_prefixed_env()
    mail = Mail(app)
    send = _SENDERS[app.config["LEDGER_MAIL"]](app, mail)
    begun = os.open(app.config["LEDGER_BEGUN"], os.O_WRONLY | os.O_APPEND)

    @app.post("/<int:number>")
    def order(number: int) -> str:
        os.write(begun, f"{number} {os.getpid()}\n".encode())

        for copy in range(COPIES):
            message = Message(f"Order {number}", ["client@ledger.example"], "Thanks.")
            message.msgId = message_id(number, copy)
            send(message)

        return sign(app.config["SECRET_KEY"], number)

    return app


def _use_apitask(app: Flask, mail: Mail) -> cabc.Callable[[Message], object]:
    app.config["APITASK_MAIL_BACKGROUND"] = True
    ApiTask(app)
    return mail.send


def _use_celery(app: Flask, mail: Mail) -> cabc.Callable[[Message], object]:
    from celery_app import celery_init_app

    app.config["APITASK_ROUTES"] = {"flask_mail.send": "celery"}
    celery_init_app(app)
    return _use_apitask(app, mail)


def _use_threads(app: Flask, mail: Mail) -> cabc.Callable[[Message], object]:
    def send(message: Message) -> None:
        with app.app_context():
            mail.send(message)

    return lambda message: threading.Thread(target=send, args=[message]).start()


def _use_executor(app: Flask, mail: Mail) -> cabc.Callable[[Message], object]:
    executor = Executor(app)
    return lambda message: executor.submit(mail.send, message)


_SENDERS: t.Final = {
    "apitask": _use_apitask,
    "celery": _use_celery,
    "thread": _use_threads,
    "executor": _use_executor,
}

app = create_app()
celery_app = app.extensions.get("celery")
