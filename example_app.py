"""One sign-up, three ways: see what background tasks save.

Start it with ``python example_app.py`` and open the address that it prints. The mail
goes to a slow server of its own, unless the environment names another::

    FLASK_MAIL_SERVER=mail.example.org FLASK_MAIL_PORT=25 python example_app.py

Other keys can be set in the same way: ``FLASK_ADMIN``, ``FLASK_RUN_PORT``, and so on.

With a broker, the mail and the audit can go to a Celery worker. Start both with::

    FLASK_BROKER=redis://localhost python example_app.py
    FLASK_BROKER=redis://localhost celery -A example_app worker --loglevel INFO
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.policy
import inspect
import logging
import os
import re
import signal
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
from flask import has_request_context
from flask import render_template_string
from flask import request
from flask import request_finished
from flask import Response
from flask_mail import email_dispatched
from flask_mail import Mail
from flask_mail import Message
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple
from werkzeug.wsgi import ClosingIterator

from flask_apitask import ApiTask
from flask_apitask import run
from flask_apitask import task
from flask_apitask import task_finished
from flask_apitask.waterfall import Span
from flask_apitask.waterfall import Waterfall

HOST = "127.0.0.1"
# Seconds for each, as if the mail server and the database were far away.
MAIL_DELAY = 0.3
AUDIT_DELAY = 0.2
# What a browser takes for an address, with a dot in it.
ADDRESS = re.compile(r"[\w!#$%&'*+/=?^`{|}~.-]+@([a-z\d-]+\.)+[a-z\d-]+", re.A | re.I)

# The code below is the same in each way. An application of yours sets its keys once.
WAYS: dict[str, dict[str, t.Any]] = {
    "plain": {"APITASK_ENABLED": False},
    "background": {"APITASK_MAIL_BACKGROUND": True},
    "answer-first": {"APITASK_MAIL_BACKGROUND": True, "APITASK_WAIT": "close"},
}

mail = Mail()
service = Blueprint("service", __name__)


@service.post("/signup")
def signup() -> tuple[str, int]:
    address = request.form.get("address", "").strip()

    if not ADDRESS.fullmatch(address):
        return "Enter an address like name@example.org.", 422

    # Plain Flask-Mail: the configuration decides whether these two lines wait.
    admin = current_app.config["ADMIN"]
    mail.send(Message("Welcome", [address], f"You are signed up as {address}."))
    mail.send(Message("A new user", [admin], f"{address} has signed up."))
    # run() makes a task of any other function.
    run(audit, address, request.remote_addr)
    return "You are signed up.", 201


@task("signup.audit")
def audit(address: str, client: str | None) -> None:
    time.sleep(AUDIT_DELAY)

    with contextlib.closing(database()) as connection, connection:
        connection.execute("INSERT INTO audit VALUES (?, ?)", [address, client])


def database() -> sqlite3.Connection:
    return sqlite3.connect(current_app.config["DATABASE"])


def create_app(settings: Config, way: str) -> Flask:
    app = TracedFlask(__name__)
    app.config.from_mapping(settings, WAY=way)
    app.config.from_mapping(WAYS[way])

    if way != "plain":
        # No mail is sent if the sign-up fails after all.
        app.config["APITASK_MAIL_START"] = "success"

    if "BROKER" in settings and way != "plain":
        # This one key makes all the difference.
        app.config["APITASK_ROUTES"] = {"signup.*": "celery", "flask_mail.*": "celery"}
        make_celery(app)

    mail.init_app(app)
    ApiTask(app)
    app.register_blueprint(service)
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


# What follows is for the page that shows what the ways do: no application needs it.


@dataclasses.dataclass
class Trace:
    """What happened when in a sign-up, in seconds of ``time.monotonic()``."""

    begun: float
    view_ended: float = 0.0
    answered: float = 0.0
    status: int = 0
    tasks: list[Span] = dataclasses.field(default_factory=list)
    log: list[str] = dataclasses.field(default_factory=list)
    is_closed: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        return self.answered - self.begun

    @property
    def ended(self) -> float:
        return max([self.answered, *(task.finished or 0.0 for task in self.tasks)])

    def draw(self, total: float) -> Waterfall:
        view = Span("View", "view", self.begun, self.begun, self.view_ended)
        wait = Span("Wait", "wait", self.view_ended, self.view_ended, self.ended)
        chart = Waterfall(self.begun, view, self.tasks, wait)
        chart.total = total  # One scale for all ways.
        return chart


# The last sign-up in each way.
traces: dict[str, Trace] = {}


class TracedFlask(Flask):
    """Notes when the server gets a response, and when that response is closed."""

    def wsgi_app(self, environ: dict[str, t.Any], start_response: t.Any) -> t.Any:
        trace = environ["example.trace"] = Trace(time.monotonic())
        response = super().wsgi_app(environ, start_response)
        trace.answered = time.monotonic()

        # Anything else is no sign-up.
        if trace.status in (201, 500):
            traces[self.config["WAY"]] = trace

        return ClosingIterator(response, trace.is_closed.set)


def find_trace() -> Trace | None:
    # A task has the request of its view, but not in a Celery worker.
    return request.environ.get("example.trace") if has_request_context() else None


@request_finished.connect
def note_view(app: Flask, response: Response, **extra: object) -> None:
    if trace := find_trace():
        trace.view_ended, trace.status = time.monotonic(), response.status_code


@task_finished.connect
def note_task(app: Flask, exception: BaseException | None, **fields: t.Any) -> None:
    if trace := find_trace():
        moments = (fields[name] for name in ("submitted", "started", "finished"))
        span = Span(fields["name"], fields["how"], *moments)
        span.error = "" if exception is None else repr(exception)
        trace.tasks.append(span)


@email_dispatched.connect
def note_mail(app: Flask, message: Message, **extra: object) -> None:
    # Where no task sends it, the date of the message says when it began.
    if app.config["WAY"] == "plain" and message.date and (trace := find_trace()):
        now = time.monotonic()
        begun = now - (time.time() - message.date)
        trace.tasks.append(Span("mail.send", "inline", begun, begun, now))


class LogLines(logging.Handler):
    """Notes what is logged, without the stack."""

    def emit(self, record: logging.LogRecord) -> None:
        if trace := find_trace():
            error = record.exc_info and record.exc_info[1]
            text = f"{record.levelname}: {record.getMessage()}"
            trace.log.append(f"{text}\n{error!r}" if error else text)


class MailServer:
    """An SMTP server that keeps the messages, and serves until the process ends."""

    def __init__(self, port: int) -> None:
        self.inbox: list[email.message.EmailMessage] = []
        loop = asyncio.new_event_loop()
        smtp = loop.create_server(lambda: SMTP(self, hostname="localhost"), HOST, port)
        server = loop.run_until_complete(smtp)
        self.port: int = server.sockets[0].getsockname()[1]
        threading.Thread(target=loop.run_forever, daemon=True).start()

    async def handle_DATA(self, server: SMTP, session: t.Any, envelope: t.Any) -> str:
        await asyncio.sleep(MAIL_DELAY)

        if "refused@example.org" in envelope.rcpt_tos:
            return "550 5.1.1 No such user"

        policy = email.policy.default
        self.inbox.append(email.message_from_bytes(envelope.content, policy=policy))
        return "250 OK"


site = Flask(__name__)


@site.get("/")
def index() -> str:
    shown = dict(traces)

    for trace in shown.values():
        # The response may have been faster than its tasks.
        trace.is_closed.wait(timeout=30)

    total = max((trace.ended - trace.begun for trace in shown.values()), default=0.0)
    code = inspect.getsource(signup)
    return render_template_string(PAGE, ways=WAYS, traces=shown, total=total, code=code)


def load_settings() -> Config:
    settings = Config(".", {"ADMIN": "admin@example.org", "RUN_PORT": 0})
    settings["MAIL_DEFAULT_SENDER"] = "signup@example.org"
    settings.from_prefixed_env()

    if "BROKER" in settings:
        # Fixed, so that the worker finds the mail server and the database too.
        settings.setdefault("MAIL_PORT", 8025)
        folder = tempfile.gettempdir()
        settings.setdefault("DATABASE", f"{folder}/flask-apitask-example.sqlite")

    return settings


def interrupt(*_: object) -> t.NoReturn:
    # A second Ctrl-C, which tox sends, would interrupt the clean-up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    settings = load_settings()

    if "MAIL_SERVER" not in settings:
        settings["EMBEDDED"] = embedded = MailServer(settings.get("MAIL_PORT", 0))
        settings["MAIL_PORT"] = embedded.port
        print(f"Mail goes to an embedded server on port {embedded.port}.", flush=True)

    signal.signal(signal.SIGINT, interrupt)

    with tempfile.TemporaryDirectory() as directory:
        settings.setdefault("DATABASE", f"{directory}/signup.sqlite")
        site.config.from_mapping(settings)
        apps: dict[str, t.Any] = {f"/{way}": create_app(settings, way) for way in WAYS}
        apps["/plain"].logger.addHandler(LogLines())

        with site.app_context(), contextlib.closing(database()) as connection:
            connection.execute("DROP TABLE IF EXISTS audit")
            connection.execute("CREATE TABLE audit (address, client)")

        wsgi_app = DispatcherMiddleware(site, apps)
        run_simple(HOST, settings["RUN_PORT"], wsgi_app, threaded=True)


PAGE = """<!doctype html><html lang="en">
<meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Flask-ApiTask: one sign-up, three ways</title>
<style>
  :root { color-scheme: light dark; --accent: light-dark(#1d4ed8, #93b4ff);
    --soft: color-mix(in srgb, CanvasText 6%, Canvas) }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
    padding: 0 1rem; overflow-wrap: anywhere }
  h1, h2, p { line-height: 1.3; margin: 0 0 .5rem } p { max-width: 44rem }
  form { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin: 1rem 0 }
  label { flex: 1 0 100% } input { flex: 0 1 18rem; min-width: 0 }
  input, button { font: inherit; padding: .5rem 1rem; border: 1px solid GrayText;
    border-radius: .5rem } [type=submit] { background: #1d4ed8; color: #fff }
  #ways { display: grid; gap: 0 1rem;
    grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)) }
  article { display: grid; grid-row: span 7; grid-template-rows: subgrid }
  article, details { background: var(--soft); border-radius: .5rem; padding: 1rem;
    margin: 0 0 1rem } summary { cursor: pointer } [role=status] { min-height: 1.3em }
  pre { white-space: pre-wrap; margin: .5rem 0 } pre, ol { font-size: .8rem }
  article div pre { color: light-dark(#b42318, #ff9b8f) }
  data { font-size: 1.75rem; font-weight: bold } .chart { position: relative }
  .answer, .response { border-left: 3px dashed var(--accent); padding-left: .5rem }
  .response { position: absolute; top: 0; bottom: 0 }
  ol { list-style: none; margin: 1rem 0; padding: 0 }
  li span { position: relative; z-index: 1; background: var(--soft) }
  i { display: block; height: .75rem; border-radius: .2rem; background: #2f9e5b }
  .failed { background: #e5484d } .view { background: #5b8def }
  .wait { background: #a58bdc }
</style>
<h1>One sign-up, three ways</h1>
<p>This is the example application of <strong>Flask-ApiTask</strong>: background work
  that belongs to a Flask request. A sign-up sends two mails
  {%- if config.EMBEDDED %}, in 300 ms each,{% endif %} and writes an audit row, in
  200 ms. The code is the same each time. Only the configuration differs.</p>
<form action="/background/signup" method="post">
  <label for="address">E-mail address</label>
  <input id="address" name="address" type="email" required autocomplete="email"
    value="ada@example.org"> <button type="submit">Sign up with each way</button>
  {% if config.EMBEDDED %}<button type="button">Use an address that fails</button>
  {% endif %}</form>
<p role="status"></p>
<div id="results"><div id="ways">{% for way, title, text in [
  ("plain", "Plain Flask-Mail", "The view does one thing after the other."),
  ("background", "In the background",
    "Mails and audit run at the same time. The response waits for them."),
  ("answer-first", "Answer first",
    "The response is sent first. Then the server waits for mails and audit.")] %}
<article id="{{ way }}"><h2>{{ title }}</h2><p>{{ text }}</p>
  <pre>{% for item in ways[way].items() %}{{ "%s = %r\n" % item }}{% endfor %}</pre>
  {% if way in traces %}{% set trace, plain = traces[way], traces.plain %}
  <p class="answer">
    <data value="{{ trace.seconds }}">{{ "%.0f" % (1000 * trace.seconds) }} ms</data>
    to the response</p>
  <p>Status {{ trace.status }}, finished after
    {{ "%.0f" % (1000 * (trace.ended - trace.begun)) }} ms<br>
    {% if way != "plain" and plain and plain.status == trace.status %}<strong>
    {{- "%.1f" % (plain.seconds / trace.seconds) }} times faster</strong>{% endif %}</p>
  <div class="chart"><ol>{% for row in trace.draw(total).rows %}
    <li><span>{{ row.label }}</span><i class="{{ row.outcome }}"
      style="margin-left: {{ row.x }}%; width: {{ row.width }}%"></i></li>
    {% endfor %}</ol>
    <div class="response" style="left: {{ 100 * trace.seconds / total }}%"></div></div>
  <div>{% for line in trace.log %}<pre>{{ line }}</pre>{% endfor %}</div>{% endif %}
</article>{% endfor %}</div>
{% if config.EMBEDDED %}<details><summary>Mails that have arrived</summary>
  {% for mail in config.EMBEDDED.inbox | reverse %}
  <p>{{ mail.subject }}, to {{ mail.to }}: {{ mail.get_content() }}</p>{% endfor %}
</details>{% endif %}</div>
<details><summary>The code of the view</summary><pre>{{ code }}</pre></details>
<script>
  const [form] = document.forms, status = document.querySelector("[role=status]");
  const [submit, fail] = form.querySelectorAll("button");
  if (fail) fail.onclick = () => form.elements.address.value = "refused@example.org";
  form.onsubmit = async event => {
    event.preventDefault();
    if (form.ariaBusy) return;
    form.ariaBusy = true;
    let outcome = "Done: the times are below.";
    for (const article of document.querySelectorAll("article")) {
      status.textContent = `Signing up: ${article.id} …`;
      const fields = {method: "POST", body: new FormData(form)};
      const response = await fetch(`/${article.id}/signup`, fields);
      if (response.status === 422) outcome = await response.text();
    }
    const text = await (await fetch("/")).text();
    const page = new DOMParser().parseFromString(text, "text/html");
    document.querySelector("#results").replaceWith(page.querySelector("#results"));
    status.textContent = outcome;
    form.ariaBusy = null;
  };
</script>
"""

if __name__ == "__main__":
    main()
elif "FLASK_BROKER" in os.environ:
    celery = create_app(load_settings(), "background").extensions["celery"]
