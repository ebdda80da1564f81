"""An app in debug mode, with the panel of Flask-DebugToolbar on each page."""

from __future__ import annotations

import time
import typing as t

from flask import Flask
from flask import redirect
from flask_debugtoolbar import DebugToolbarExtension

from flask_apitask import ApiTask
from flask_apitask import run
from flask_apitask import run_on_success
from flask_apitask import task

if t.TYPE_CHECKING:
    from werkzeug.wrappers import Response

PAGE = "<!doctype html><title>Page</title><body><h1>Page</h1></body>"
MARKUP = "<img src=x onerror=\"document.title = 'hacked'\">'&amp;"


@task("mailer.welcome")
def send_mail(pause: float) -> None:
    """Take some time, as a mail does."""
    time.sleep(pause)


@task(MARKUP)
def fail(text: str) -> None:
    """Fail, as a task."""
    raise LookupError(text)


def make_panel_app(**config: t.Any) -> Flask:
    """Make an app; keywords are keys of its configuration."""
    app = Flask(__name__)
    app.debug = True
    app.config.update(
        SECRET_KEY="only for a test",
        DEBUG_TB_PANELS=["flask_apitask.debugtoolbar.ApiTaskPanel"],
        **config,
    )
    DebugToolbarExtension(app)
    ApiTask(app)

    @app.get("/")
    def index() -> str:
        run(send_mail, 0.06)
        run(send_mail, 0.03)
        run(fail, MARKUP)
        time.sleep(0.02)
        return PAGE

    @app.get("/none")
    def none() -> str:
        return PAGE

    @app.get("/many")
    def many() -> str:
        for _ in range(500):
            run(send_mail, 0.001)

        return PAGE

    @app.get("/dropped")
    def dropped() -> str:
        first = run(send_mail, 0.02)
        run(send_mail, 0).cancel()
        run_on_success(send_mail, 0)
        first.result()
        return PAGE

    @app.get("/redirect")
    def go() -> Response:
        run(send_mail, 0)
        return redirect("/none")

    @app.errorhandler(404)
    def missing(error: Exception) -> tuple[str, int]:
        run(send_mail, 0)
        return PAGE, 404

    return app
