"""An app whose tasks and mail go to Celery: what a worker, and the tests, import."""

from __future__ import annotations

import contextvars
import time
import typing as t

import flask_mailman  # type: ignore[import-untyped]
import kombu.pools
from celery import Celery
from celery import Task as CeleryTask
from flask import appcontext_popped
from flask import appcontext_pushed
from flask import current_app
from flask import Flask
from flask_mail import Mail
from flask_mail import Message

from flask_apitask import ApiTask
from flask_apitask import run
from flask_apitask import task
from flask_apitask import task_finished

mail = Mail()
mailman = flask_mailman.Mail()
# How many app contexts are pushed at once.
depth: contextvars.ContextVar[int] = contextvars.ContextVar("depth", default=0)


def celery_init_app(app: Flask) -> Celery:
    """Make the Celery app of a Flask app, as Flask's documentation does."""

    class FlaskTask(CeleryTask):  # type: ignore[misc]
        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    app.extensions["celery"] = celery_app
    return celery_app


def create_app(**config: t.Any) -> Flask:
    """Make the app; ``FLASK_...`` variables configure it too."""
    app = Flask(__name__)
    app.config.update(
        APITASK_ROUTES={"report.*": "celery", "flask_mail*.send": "celery"},
        APITASK_MAIL_BACKGROUND=True,
        MAIL_SERVER="127.0.0.1",
        MAIL_DEFAULT_SENDER="app@celery.example",
        CELERY={},
    )
    app.config.update(config)
    app.config.from_prefixed_env()
    mail.init_app(app)
    mailman.init_app(app)
    ApiTask(app)
    celery_init_app(app)

    @appcontext_pushed.connect_via(app, weak=False)
    def count_push(app: Flask, **extra: object) -> None:
        depth.set(depth.get() + 1)

    @appcontext_popped.connect_via(app, weak=False)
    def count_pop(app: Flask, **extra: object) -> None:
        depth.set(depth.get() - 1)

    @app.post("/report/<int:number>")
    def report(number: int) -> str:
        result: t.Any = run(double, number).result()
        return str(result.id)

    @app.post("/mail/<name>")
    def send(name: str) -> str:
        mail.send(Message(f"For {name}", [f"{name}@celery.example"], "Thanks."))
        return "sent"

    return app


@task("report.double")
def double(number: int) -> int:
    """Do what can be told from outside."""
    return 2 * number


@task("report.describe")
def describe() -> dict[str, t.Any]:
    """Tell where a task runs."""
    hows: list[str] = []

    def receive(app: Flask, how: str, **extra: object) -> None:
        hows.append(how)

    with task_finished.connected_to(receive):
        inner = run(tell_name)

    return {
        "app": current_app.name,
        "pushed": depth.get(),
        "inner": inner.result() if inner.done() else None,
        "inner_how": hows,
    }


@task("report.inner")
def tell_name() -> str:
    """Be called by another task."""
    return current_app.name


@task("report.fail")
def fail(text: str) -> None:
    """Fail."""
    raise LookupError(text)


@task("report.wait")
async def wait() -> str:
    """Be async."""
    return "waited"


@task("report.sleep")
def sleep(seconds: float) -> None:
    """Take a while."""
    time.sleep(seconds)


class Celeries:
    """Apps with Celery, of which nothing is left when they are closed."""

    def __init__(self) -> None:
        self._apps: list[Flask] = []

    def make(self, broker: str = "memory://", **config: t.Any) -> Flask:
        """Make an app for a broker. Redis stores the results too.

        A broker that is just slow does not count as down, unless a test says so.
        """
        backend = broker if broker.startswith("redis") else "cache+memory://"
        celery_config = {"broker_url": broker, "result_backend": backend}
        celery_config |= config.pop("CELERY", {})
        config.setdefault("APITASK_CELERY_TIMEOUT", 20.0)
        return self.adopt(create_app(CELERY=celery_config, **config))

    def adopt(self, app: Flask) -> Flask:
        """Take over an app that was made elsewhere."""
        self._apps.append(app)
        return app

    def close(self) -> None:
        """Close the connections of all, and forget the apps."""
        for app in self._apps:
            if "apitask_celery" in app.extensions:
                app.extensions["apitask_celery"].close()

            app.extensions.pop("celery").close()
            app.extensions.clear()

        kombu.pools.reset()  # type: ignore[no-untyped-call]
        self._apps.clear()
        # The one that was made last is the current one, for ever.
        Celery("nothing")
