"""A span per task, with the real SDK and the real instrumentation of Flask."""

from __future__ import annotations

import json
import os
import typing as t

import pytest
from conftest import PATIENCE
from conftest import wait_until
from flask import current_app
from flask import Flask
from flask import stream_with_context
from flask_mail import Mail
from flask_mail import Message
from late_threads import make_late
from scopes import fail
from scopes import Gate
from smtp_servers import Fault
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import run_on_success
from flask_apitask import scoped
from flask_apitask import task
from flask_apitask import task_finished
from flask_apitask import task_started

if os.environ.get("APITASK_REQUIRE_SERVICES") != "1":
    pytest.importorskip("opentelemetry.sdk.trace")
    pytest.importorskip("opentelemetry.instrumentation.flask")

from opentelemetry import context
from opentelemetry import trace
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flask_apitask.opentelemetry import trace_tasks

# OpenTelemetry's instrumentation uses a name that Flask 3.2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'request_ctx':DeprecationWarning")

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from brokers import Broker
    from celery_app import Celeries


def span_id(span: trace.SpanContext | None) -> str:
    """Return the identifier of a span, as it is written."""
    assert span is not None
    return f"0x{trace.format_span_id(span.span_id)}"


class Traces:
    """What was traced."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: trace.Tracer = self.provider.get_tracer("library")

    def trace(self, app: Flask) -> Flask:
        """Trace the requests and the tasks of an app."""
        FlaskInstrumentor.instrument_app(app, tracer_provider=self.provider)  # type: ignore[no-untyped-call]
        trace_tasks(app, tracer_provider=self.provider)
        return app

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """Those that have ended, by their names, which a test gives only once."""
        spans = self._exporter.get_finished_spans()
        by_name = {span.name: span for span in spans}
        assert len(by_name) == len(spans), [span.name for span in spans]
        return by_name

    @property
    def parents(self) -> dict[str, str | None]:
        """The name of each span's parent, by that of the span."""
        spans = self.spans.items()
        names = {span_id(span.get_span_context()): name for name, span in spans}
        return {
            name: names[span_id(span.parent)] if span.parent else None
            for name, span in spans
        }

    @property
    def text(self) -> str:
        """All that leaves the process."""
        return "".join(span.to_json() for span in self.spans.values())


@pytest.fixture(autouse=True)
def traces(caplog: pytest.LogCaptureFixture) -> cabc.Iterator[Traces]:
    """Make traces; nothing is left current, and the SDK has nothing to complain of."""
    yield Traces()
    assert context.get_current() == {}
    complaints = [r for r in caplog.records if r.name.startswith("opentelemetry")]
    assert not complaints


def make_app(traces: Traces, **config: t.Any) -> Flask:
    """Make an app that is traced."""
    app = Flask(__name__)
    app.config.update(config)
    # What is registered before the extension ends after the wait.
    traces.trace(app)
    ApiTask(app)
    return app


def get(app: Flask, view: cabc.Callable[[], object], status: int = 200) -> None:
    """Make a request to a view, and read all of the response."""
    app.add_url_rule("/", "index", lambda: [view()] and ("", status))
    assert app.test_client().get("/", buffered=True).status_code == status


@task("half")
def half(number: float) -> float:
    """Divide, as a task."""
    return number / 2


def test_span_of_a_task(traces: Traces) -> None:
    """A span says what ran, when, where, and how long it had waited, and no more."""
    app = make_app(traces)
    waits: list[float] = []

    def note(app: Flask, submitted: float, started: float, **extra: object) -> None:
        waits.append(started - submitted)

    with task_started.connected_to(note, app):
        get(app, lambda: run(half, 3.25))

    assert traces.parents == {"half": "GET /", "GET /": None}
    span, request = traces.spans["half"], traces.spans["GET /"]
    assert span.kind is trace.SpanKind.INTERNAL
    assert span.status.status_code is trace.StatusCode.UNSET
    assert span.attributes == {"apitask.how": "thread", "apitask.queued": waits[0]}
    times = [request.start_time, span.start_time, span.end_time, request.end_time]
    assert times == sorted(times, key=lambda time: time or 0)
    assert "3.25" not in traces.text


@pytest.mark.parametrize("is_async", [False, True])
def test_spans_in_a_task(traces: Traces, is_async: bool) -> None:
    """What a library traces in a task is part of the task, and not of the view."""
    app = make_app(traces)

    @task("query")
    def query() -> None:
        traces.tracer.start_span("SELECT").end()

    @task("query")
    async def async_query() -> None:
        query()

    def view() -> None:
        run(async_query if is_async else query).result(PATIENCE)
        traces.tracer.start_span("of the view").end()

    get(app, view)
    of_request = dict.fromkeys(["query", "of the view"], "GET /")
    assert traces.parents == {"SELECT": "query", **of_request, "GET /": None}


def test_span_that_is_current_in_the_view(traces: Traces) -> None:
    """The parent is what was current at run(), though that is not the request's."""
    app = make_app(traces)

    def view() -> None:
        with traces.tracer.start_as_current_span("checkout"):
            run(half, 1)

    get(app, view)
    assert traces.parents == {"half": "checkout", "checkout": "GET /", "GET /": None}


def test_plain_calls(traces: Traces) -> None:
    """A plain call in a task is a child of that task, which is current again after."""
    app = make_app(traces)

    @task("outer")
    def outer() -> None:
        run(half, 1)
        traces.tracer.start_span("after").end()

    get(app, lambda: run(outer))
    of_task = dict.fromkeys(["half", "after"], "outer")
    assert traces.parents == {**of_task, "outer": "GET /", "GET /": None}
    assert traces.spans["half"].attributes
    assert traces.spans["half"].attributes["apitask.how"] == "inline"


def test_plain_calls_in_coroutines(traces: Traces) -> None:
    """A task that an async task calls has its span on whichever thread it runs."""
    app = make_app(traces)

    @task("inner")
    async def inner() -> None:
        traces.tracer.start_span("SELECT").end()

    @task("outer")
    async def outer() -> None:
        await run(inner)

    get(app, lambda: run(outer))
    assert traces.parents == {
        **{"SELECT": "inner", "inner": "outer", "outer": "GET /", "GET /": None}
    }


def test_outside_of_a_request(traces: Traces) -> None:
    """Where nothing is current, a plain call is a trace of its own."""
    with make_app(traces).app_context():
        run(half, 1)

    assert traces.parents == {"half": None}


def check_failure(span: ReadableSpan) -> None:
    """Check that the span of a task that fails tells of its exception."""
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "LookupError"
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes
    assert event.attributes["exception.type"] == "LookupError"
    assert event.attributes["exception.message"] == "no such account"
    assert "raise error\nLookupError" in str(event.attributes["exception.stacktrace"])


def test_task_that_fails(traces: Traces) -> None:
    """An exception is recorded, the status is an error, and nobody else's is."""
    error = LookupError("no such account")
    get(make_app(traces), lambda: run(fail, error))
    check_failure(traces.spans["scopes.fail"])
    assert traces.spans["GET /"].status.status_code is trace.StatusCode.UNSET


def test_plain_call_that_fails(traces: Traces) -> None:
    """Nothing is left current where a plain call raises its exception."""
    with make_app(traces).app_context(), pytest.raises(LookupError):
        run(fail, LookupError("no such account"))

    assert trace.get_current_span() is trace.INVALID_SPAN
    check_failure(traces.spans["scopes.fail"])


def test_exception_without_a_text(traces: Traces) -> None:
    """An exception that can't be recorded does not keep the span from ending."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    get(make_app(traces), lambda: run(fail, Mute()))
    assert traces.parents == {"scopes.fail": "GET /", "GET /": None}
    assert traces.spans["scopes.fail"].status.description == "Mute"


def test_scopes_of_their_own(traces: Traces) -> None:
    """A task of a view or block with a scope is a child of what was current there."""
    app = make_app(traces, APITASK_ENABLED=False)

    @scoped
    def view() -> None:
        run(half, 1)

        with traces.tracer.start_as_current_span("block"), open_scope():
            run(task("quarter")(lambda: None))

    get(app, view)
    assert traces.parents == {
        **{"quarter": "block", "block": "GET /", "half": "GET /", "GET /": None}
    }


@pytest.mark.parametrize("start", [run, run_on_success])
def test_answer_first(traces: Traces, start: t.Any) -> None:
    """A task that begins after the end of the request's span is still its child."""
    app = make_late(make_app(traces, APITASK_WAIT="close"))
    get(app, lambda: start(half, 1))
    assert traces.parents == {"half": "GET /", "GET /": None}
    begun, ended = traces.spans["half"].start_time, traces.spans["GET /"].end_time
    assert begun
    assert ended
    assert begun > ended


def test_stream(traces: Traces) -> None:
    """Tasks of a view that streams, and of its stream, are children of the request."""
    app = make_app(traces)

    @app.get("/")
    def index() -> cabc.Iterator[str]:
        def generate() -> cabc.Iterator[str]:
            yield "a"
            run(task("quarter")(lambda: None))
            yield "b"

        run(half, 1)
        return stream_with_context(generate())

    assert app.test_client().get("/").text == "ab"
    of_request = dict.fromkeys(["half", "quarter"], "GET /")
    assert traces.parents == {**of_request, "GET /": None}


def test_start_on_success(traces: Traces) -> None:
    """A deferred task is a child of the span that was current at its call."""
    app = make_app(traces)

    def view() -> None:
        with traces.tracer.start_as_current_span("checkout"):
            run_on_success(half, 1)

    get(app, view)
    assert traces.parents == {"half": "checkout", "checkout": "GET /", "GET /": None}
    checkout, begun = traces.spans["checkout"].end_time, traces.spans["half"].start_time
    assert checkout
    assert begun
    assert begun > checkout


def test_dropped_tasks(traces: Traces) -> None:
    """A task that never runs is an event of the request, with its name and reason."""
    app, gate = make_app(traces, APITASK_MAX_WORKERS=1), Gate()

    def view() -> None:
        run_on_success(half, 3.25)
        run(gate)
        run(task("quarter")(lambda: None)).cancel()
        gate.opened.set()

    get(app, view, 404)
    assert traces.parents == {"scopes.Gate": "GET /", "GET /": None}
    events = traces.spans["GET /"].events
    assert {event.name for event in events} == {"apitask.dropped"}
    found = [dict(event.attributes or {}) for event in events]
    half_is = "half", "the response has the status 404"
    quarter_is = "quarter", "it was cancelled"
    assert sorted(tuple(each.values()) for each in found) == [half_is, quarter_is]
    assert [*found[0]] == [*found[1]] == ["apitask.task", "apitask.reason"]
    assert "3.25" not in traces.text


def test_dropped_task_without_a_span(traces: Traces) -> None:
    """Where nothing is traced, a task that is dropped leaves no trace."""
    with make_app(traces).app_context(), open_scope():
        run_on_success(half, 1).cancel()

    assert traces.spans == {}


def make_mail_app(traces: Traces, port: int) -> tuple[Flask, Mail]:
    """Make an app that is traced and sends its mail in the background."""
    config = {"MAIL_DEFAULT_SENDER": "shop@example.org", "MAIL_PORT": port}
    app = Flask(__name__)
    app.config.update(config, APITASK_MAIL_BACKGROUND=True, APITASK_MAIL_KEEPALIVE=0)
    mail = Mail(app)
    traces.trace(app)
    ApiTask(app)
    return app, mail


@pytest.mark.parametrize("fault", [None, Fault.PERMANENT])
def test_mail(traces: Traces, fault: Fault | None) -> None:
    """Background mail has a span, with no address in it, even if it is refused."""
    with ScriptedServer() as server:
        app, mail = make_mail_app(traces, server.port)

        if fault is not None:
            server.fail(Stage.RCPT, fault)

        get(app, lambda: mail.send(Message("Hello", ["ada@example.com"], "Hi.")))

    assert traces.parents == {"flask_mail.send": "GET /", "GET /": None}
    status = trace.StatusCode.UNSET if fault is None else trace.StatusCode.ERROR
    assert traces.spans["flask_mail.send"].status.status_code is status
    assert "ada@" not in traces.text
    assert "shop@" not in traces.text
    assert "Hello" not in traces.text


def test_apps_apart(traces: Traces, caplog: pytest.LogCaptureFixture) -> None:
    """Each app has a tracer of its own, one for all calls, and others have none."""
    others = Traces()
    app, other = make_app(traces), make_app(others)
    trace_tasks(app, tracer_provider=traces.provider)
    untraced = Flask(__name__)

    for each in (app, other, untraced):
        with each.app_context():
            run(half, 1)

    assert traces.parents == others.parents == {"half": None}
    assert not caplog.records


def test_proxy_of_an_app(traces: Traces) -> None:
    """The current app may be given by its proxy; anything else is refused."""
    with Flask(__name__).app_context():
        trace_tasks(current_app, tracer_provider=traces.provider)
        run(half, 1)

    assert traces.parents == {"half": None}

    with pytest.raises(TypeError) as caught:
        trace_tasks(__name__)  # type: ignore[arg-type]

    text = "trace_tasks() takes the Flask app, not 'test_opentelemetry'."
    assert str(caught.value) == text


def test_task_that_began_before(traces: Traces) -> None:
    """What runs when the tracing begins is not traced, and nothing else ends for it."""
    app = Flask(__name__)
    ApiTask(app)
    gate = Gate()

    def receive(app: Flask, **extra: object) -> None:
        """Have the signals sent."""

    with task_finished.connected_to(receive, app), app.app_context():
        with traces.tracer.start_as_current_span("around"):
            with open_scope():
                run(gate)
                assert gate.begun.wait(PATIENCE)
                trace_tasks(app, tracer_provider=traces.provider)
                gate.opened.set()

            run(half, 1)

    assert traces.parents == {"half": "around", "around": None}


def test_span_that_fails(traces: Traces, caplog: pytest.LogCaptureFixture) -> None:
    """A task whose span can't be made is done, and does not end that of its caller."""

    class Failing(SpanProcessor):
        def on_start(self, span: trace.Span, parent_context: object = None) -> None:
            if isinstance(span, ReadableSpan) and span.name == "half":
                raise LookupError

    app = make_app(traces)
    traces.provider.add_span_processor(Failing())

    @task("outer")
    def outer() -> None:
        assert run(half, 1).result() == 0.5
        traces.tracer.start_span("after").end()

    get(app, lambda: run(outer))
    assert traces.parents == {"after": "outer", "outer": "GET /", "GET /": None}
    assert caplog.messages == ["A receiver of the signal 'task-started' failed."]


@pytest.fixture
def celery_is_traced(traces: Traces) -> cabc.Iterator[None]:
    """Have Celery traced by OpenTelemetry's own instrumentation."""
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.celery")
    instrumentor = instrumentation.CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=traces.provider)
    yield
    instrumentor.uninstrument()


@pytest.mark.usefixtures("celery_is_traced")
def test_eager_celery(traces: Traces, celeries: Celeries) -> None:
    """A task that Celery runs on the spot is a child of Celery's own span."""
    app = traces.trace(celeries.make(CELERY={"task_always_eager": True}))
    assert app.test_client().post("/report/4").status_code == 200
    assert traces.parents == {
        "report.double": "run/report.double",
        "run/report.double": "POST /report/<int:number>",
        "POST /report/<int:number>": None,
    }
    assert traces.spans["report.double"].attributes
    assert traces.spans["report.double"].attributes["apitask.how"] == "celery"


@pytest.mark.usefixtures("celery_is_traced")
def test_celery_worker(
    traces: Traces, celeries: Celeries, redis: Broker, tmp_path: pathlib.Path
) -> None:
    """A task or mail in a worker belongs to the trace of the request."""
    from brokers import Worker

    written = tmp_path / "spans"
    variables = {
        "FLASK_CELERY": json.dumps({"broker_url": redis.url}),
        "SPANS": str(written),
    }

    with ScriptedServer() as server:
        variables["FLASK_MAIL_PORT"] = str(server.port)

        with Worker(tmp_path, "traced_worker:celery_app", "threads", variables):
            client = traces.trace(celeries.make(redis.url)).test_client()
            assert client.post("/report/4").status_code == 200
            assert client.post("/mail/ada").status_code == 200
            wait_until(lambda: written.read_text().count("\n") == 4, PATIENCE * 2)

    spans = [json.loads(line) for line in written.read_text().splitlines()]
    names = {span["context"]["span_id"]: span["name"] for span in spans}

    for name, span in traces.spans.items():
        names[span_id(span.get_span_context())] = name

    assert {span["name"]: names[span["parent_id"]] for span in spans} == {
        "report.double": "run/report.double",
        "run/report.double": "apply_async/report.double",
        "flask_mail.send": "run/flask_mail.send",
        "run/flask_mail.send": "apply_async/flask_mail.send",
    }
    assert traces.parents == {
        "apply_async/report.double": "POST /report/<int:number>",
        "POST /report/<int:number>": None,
        "apply_async/flask_mail.send": "POST /mail/<name>",
        "POST /mail/<name>": None,
    }
    ours = [span for span in spans if not span["name"].startswith("run/")]
    assert [span["attributes"] for span in ours] == [{"apitask.how": "celery"}] * 2
    assert "ada@" not in written.read_text() + traces.text
