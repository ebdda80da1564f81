"""A sign-up service that sends its mail in the background, or not: feel the difference.

Start it with ``python example_app.py`` and open the address that it prints. The mail
goes to a server of its own, slow on purpose, unless the environment names another::

    FLASK_MAIL_SERVER=mail.example.org FLASK_MAIL_PORT=25 python example_app.py

Other keys can be set like this, too: ``FLASK_ADMIN``, ``FLASK_RUN_PORT``, and so on.

With a broker, the mail and the audit go to a worker of Celery, which is started so::

    FLASK_BROKER=redis://localhost python example_app.py
    FLASK_BROKER=redis://localhost celery -A example_app worker
"""

from __future__ import annotations

import asyncio
import email.policy
import os
import re
import sqlite3
import tempfile
import threading
import time
import typing as t

from aiosmtpd.smtp import SMTP
from flask import Blueprint
from flask import Config
from flask import current_app
from flask import Flask
from flask import g
from flask import redirect
from flask import render_template_string
from flask import request
from flask import url_for
from flask_mail import Mail
from flask_mail import Message
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple

from flask_apitask import ApiTask
from flask_apitask import run_on_success
from flask_apitask import task

if t.TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

HOST = "127.0.0.1"
# Seconds that the embedded server takes for each mail, as one that is far away does.
DELAY = 0.3
# Atoms and dots (RFC 5322) before the @, a host name with a dot (RFC 1123) after it.
ATOM = r"[\w!#$%&'*+/=?^`{|}~-]+"
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
ADDRESS = re.compile(rf"{ATOM}(\.{ATOM})*@({LABEL}\.)+{LABEL}", re.A | re.I)
SCHEMA = """
DROP TABLE IF EXISTS user;
DROP TABLE IF EXISTS audit;
CREATE TABLE user (id INTEGER PRIMARY KEY, address TEXT UNIQUE COLLATE NOCASE);
CREATE TABLE audit (user_id INTEGER, client TEXT, at TEXT DEFAULT CURRENT_TIMESTAMP);
"""

pages = Blueprint("pages", __name__)
mail = Mail()
# Seconds and number of mails of the last sign-up, with the background on and off.
timings: dict[bool, tuple[float, int]] = {}


@pages.get("/")
def index(error: str | None = None) -> str:
    return render_template_string(PAGE, timings=timings, error=error)


@pages.post("/signup")
def signup() -> ResponseReturnValue:
    address = request.form.get("address", "").strip()

    if len(address) > 254 or not ADDRESS.fullmatch(address):
        return index("Enter an address like name@example.org."), 422

    try:
        with database() as connection:
            insert = "INSERT INTO user (address) VALUES (?)"
            user_id = connection.execute(insert, [address]).lastrowid
    except sqlite3.IntegrityError:
        return index("This address is signed up already."), 409

    admin = current_app.config["ADMIN"]
    messages = [
        Message("Welcome", [address], f"You are signed up as {address}."),
        Message("A new user", [admin], f"User {user_id} is {address}."),
    ]

    if "newsletter" in request.form:
        messages.append(Message("The newsletter", [address], "No news is good news."))

    for message in messages:
        # Flask-Mail as ever. The flag alone decides whether this line waits.
        mail.send(message)

    # Not if something below fails.
    run_on_success(audit, user_id, request.remote_addr)
    request.environ["example.mails"] = len(messages)
    return redirect(url_for(".index", done=1), 303)


@task("signup.audit")
def audit(user_id: int | None, client: str | None) -> None:
    # A task has its own `g`, and so its own connection, on a thread or in a worker.
    with database() as connection:
        insert = "INSERT INTO audit (user_id, client) VALUES (?, ?)"
        connection.execute(insert, [user_id, client])


@pages.get("/inbox")
def inbox() -> str:
    rows = database().execute("SELECT * FROM audit ORDER BY rowid DESC")
    return render_template_string(PAGE, audit=rows.fetchall())


def database() -> sqlite3.Connection:
    if "database" not in g:
        g.database = sqlite3.connect(current_app.config["DATABASE"])

    return t.cast("sqlite3.Connection", g.database)


def close_database(error: BaseException | None) -> None:
    if "database" in g:
        g.database.close()


class TimedFlask(Flask):
    """Times the sign-ups from outside, with the wait for the tasks that ends them."""

    def wsgi_app(self, environ: dict[str, t.Any], start_response: t.Any) -> t.Any:
        start = time.perf_counter()
        response = super().wsgi_app(environ, start_response)

        if "example.mails" in environ:
            timing = time.perf_counter() - start, environ["example.mails"]
            timings[self.config["APITASK_MAIL_BACKGROUND"]] = timing

        return response


def create_app(settings: Config, background: bool) -> Flask:
    app = TimedFlask(__name__)
    app.config.from_mapping(settings, APITASK_MAIL_BACKGROUND=background)

    if background and "BROKER" in settings:
        # This one key is all the difference.
        app.config["APITASK_ROUTES"] = {"signup.*": "celery", "flask_mail.*": "celery"}
        make_celery(app)

    mail.init_app(app)
    ApiTask(app)
    app.register_blueprint(pages)
    app.teardown_appcontext(close_database)
    return app


def make_celery(app: Flask) -> None:
    """Do what Flask's documentation does for Celery."""
    from celery import Celery
    from celery import Task

    class FlaskTask(Task):  # type: ignore[misc]
        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.conf.broker_url = app.config["BROKER"]
    celery_app.conf.task_ignore_result = True
    celery_app.set_default()
    app.extensions["celery"] = celery_app


class MailServer:
    """An SMTP server that keeps the mails, and serves until the process ends."""

    def __init__(self, port: int) -> None:
        self.inbox: list[email.message.EmailMessage] = []
        loop = asyncio.new_event_loop()
        smtp = loop.create_server(lambda: SMTP(self, hostname="localhost"), HOST, port)
        server = loop.run_until_complete(smtp)
        self.port: int = server.sockets[0].getsockname()[1]
        threading.Thread(target=loop.run_forever, daemon=True).start()

    async def handle_DATA(self, server: SMTP, session: t.Any, envelope: t.Any) -> str:
        await asyncio.sleep(DELAY)
        policy = email.policy.default
        self.inbox.append(email.message_from_bytes(envelope.content, policy=policy))
        return "250 OK"


def load_settings() -> Config:
    settings = Config(".", {"ADMIN": "admin@example.org", "RUN_PORT": 0})
    settings["MAIL_DEFAULT_SENDER"] = "signup@example.org"
    settings.from_prefixed_env()

    if "BROKER" in settings:
        # Where the worker finds them, too.
        settings.setdefault("MAIL_PORT", 8025)
        folder = tempfile.gettempdir()
        settings.setdefault("DATABASE", f"{folder}/flask-apitask-example.sqlite")

    return settings


def main() -> None:
    settings = load_settings()

    if "MAIL_SERVER" not in settings:
        settings["EMBEDDED"] = embedded = MailServer(settings.get("MAIL_PORT", 0))
        settings["MAIL_PORT"] = embedded.port
        print(f"Mail goes to an embedded server on port {embedded.port}.", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        settings.setdefault("DATABASE", f"{directory}/signup.sqlite")
        # The flag is read once, by ApiTask: so there is an app for each, and the switch
        # is a link between them. An application of yours just sets the flag.
        app = create_app(settings, background=True)
        other = create_app(settings, background=False)

        with app.app_context():
            database().executescript(SCHEMA)

        site = DispatcherMiddleware(app, {"/off": other})
        run_simple(HOST, settings["RUN_PORT"], site, threaded=True)


PAGE = """<!doctype html><html lang="en">
<meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% set title = "Sign up" if audit is undefined else "Inbox" %}
<title>{{ "Error: " if error }}{{ title }}</title>
<style>
  :root { color-scheme: light dark; --soft: color-mix(in srgb, CanvasText 7%, Canvas) }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 36rem; margin: 2rem auto;
    padding: 0 1rem; overflow-wrap: anywhere }
  nav, dl { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem }
  nav a, form, dl > div, article { background: var(--soft); border-radius: .5rem }
  form, dl > div, article { flex: 1 12rem; padding: 1rem; margin: 1rem 0 }
  nav a, button { padding: .25rem 1rem; border: 0; border-radius: .5rem }
  nav [aria-current], button, .bar { background: #2563eb; color: #fff }
  label, button, [type=email] { display: block; font: inherit; margin: .5rem 0 }
  [type=email] { box-sizing: border-box; width: 100%; padding: .5rem }
  .error { color: light-dark(#b42318, #ff9b8f); font-weight: bold }
  dl, dl > div, dd, article > * { margin: 0; font-size: 1rem }
  data { font-size: 2rem } .bar { height: .5rem; border-radius: .25rem }
</style>
<nav><a href="{{ url_for('.index') }}">Sign up</a>
  <a href="{{ url_for('.inbox') }}">Inbox</a></nav>
<h1>{{ title }}</h1>
{% if audit is undefined %}{% set on = config.APITASK_MAIL_BACKGROUND %}
<nav>Mail in background: <a href="/" {{ "aria-current=true" if on }}>On</a>
  <a href="/off/" {{ "aria-current=true" if not on }}>Off</a></nav>
<p role="status">{{ "You are signed up." if request.args.done }}</p>
<form action="{{ url_for('.signup') }}" method="post">
  <label for="address">E-mail address</label>
  <input id="address" name="address" type="email" required autocomplete="email"
    value="{{ request.form.address }}"
    {{ "aria-invalid=true aria-describedby=error autofocus" if error }}>
  {% if error %}<p class="error" id="error">{{ error }}</p>{% endif %}
  <label><input name="newsletter" type="checkbox"
    {{ "checked" if request.form.newsletter }}> Newsletter, a third mail</label>
  <button>Sign up</button>
</form>
<h2>The last sign-up took</h2>
<dl>{% for mode, name in [(True, "on"), (False, "off")] %}<div id="{{ name }}">
  <dt>with the background {{ name }}</dt>
  {% if mode in timings %}{% set seconds, mails = timings[mode] %}
  <dd><data value="{{ seconds }}">{{ "%.0f" % (1000 * seconds) }} ms</data></dd>
  <dd class="bar" style="width:{{ 100 * seconds / (timings.values() | max)[0] }}%"></dd>
  <dd>for {{ mails }} mails</dd>
  {% else %}<dd>not known yet</dd>{% endif %}</div>
{% endfor %}</dl>
<p>Measured in the server, with the wait for the tasks.
  {% if config.EMBEDDED %}The mail server takes 300 ms for each mail.{% endif %}</p>
{% else %}{% for mail in (config.EMBEDDED.inbox if config.EMBEDDED) | reverse %}
<article><h2>{{ mail.subject }}</h2>
  <p>To {{ mail.to }}</p><p>{{ mail.get_content() }}</p></article>
{% else %}<p>{{ "No mail so far." if config.EMBEDDED else
  "The mail goes to " ~ config.MAIL_SERVER ~ ", so look there." }}</p>{% endfor %}
<h2>Audit</h2>
<ul>{% for user, client, time in audit %}
  <li>{{ time }}: user {{ user }} signed up from {{ client }}</li>{% endfor %}</ul>
{% endif %}
"""

if __name__ == "__main__":
    main()
elif "FLASK_BROKER" in os.environ:
    celery = create_app(load_settings(), background=True).extensions["celery"]
