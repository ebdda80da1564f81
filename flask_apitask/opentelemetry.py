from __future__ import annotations

import contextvars
import typing as t

from flask import Flask
from flask import has_request_context
from flask import request
from flask import request_finished
from opentelemetry import context
from opentelemetry import trace

from .context import unwrap_app
from .signals import task_dropped
from .signals import task_finished
from .signals import task_started

# The key of an app's tracer in app.extensions.
_TRACER: t.Final = "apitask_tracer"
# The key of a request's span in its environ.
_SPAN: t.Final = "flask_apitask.span"


class _Running(t.NamedTuple):
    """The span of a running task.

    :param token: Takes the span out of OpenTelemetry's context again.
    :param started: When the task started, by which its end recognizes its own span.
    :param outer: The span of the task that called this one, if any.
    """

    span: trace.Span
    token: contextvars.Token[context.Context]
    started: float
    outer: _Running | None


_running: contextvars.ContextVar[_Running | None]
_running = contextvars.ContextVar("flask_apitask_span", default=None)


def trace_tasks(
    app: Flask, *, tracer_provider: trace.TracerProvider | None = None
) -> None:
    """Make an OpenTelemetry span for each task of an app. Idempotent.

    The span is a child of the one that is current where the task is started, usually
    the request's, and it is current while the task runs. It has the task's name, but
    not its arguments. If the task raises, the exception is recorded and the span's
    status is an error. A task that is dropped or cancelled has no span: it is an event
    of the span that would have been its parent, unless that has ended.

    Don't use it for metrics, because traces may be sampled; the signal
    :data:`.task_finished` is sent for every task. And don't use it in an app whose
    requests are not traced, because each task would be a trace of its own.

    :param tracer_provider: Where the tracer comes from, ``None`` for the global one.
    :raises TypeError: ``app`` is not a Flask app.
    """
    app = unwrap_app(app, "trace_tasks() takes the Flask app")
    tracer = trace.get_tracer("flask_apitask", tracer_provider=tracer_provider)
    app.extensions[_TRACER] = tracer
    request_finished.connect(_note_span, app)
    task_started.connect(_start_span, app)
    task_finished.connect(_end_span, app)
    task_dropped.connect(_add_event, app)


def _note_span(app: Flask, **extra: object) -> None:
    """Keep the span of a request, which is no longer current in a streamed body."""
    request.environ[_SPAN] = trace.get_current_span()


def _find_parent() -> context.Context:
    """Return OpenTelemetry's context, with the request's span if it has none."""
    found = context.get_current()

    if trace.get_current_span() is trace.INVALID_SPAN and has_request_context():
        span = request.environ.get(_SPAN, trace.INVALID_SPAN)
        return trace.set_span_in_context(span, found)

    return found


def _start_span(
    app: Flask, name: str, how: str, submitted: float, started: float, **extra: object
) -> None:
    attributes: dict[str, str | float] = {"apitask.how": how}

    # A worker does not know when the task was submitted.
    if how != "celery":
        attributes["apitask.queued"] = started - submitted

    tracer: trace.Tracer = app.extensions[_TRACER]
    parent = _find_parent()
    span = tracer.start_span(name, parent, attributes=attributes)
    token = context.attach(trace.set_span_in_context(span, parent))
    _running.set(_Running(span, token, started, _running.get()))


def _end_span(
    app: Flask, started: float, exception: BaseException | None, **extra: object
) -> None:
    running = _running.get()

    # Tracing may have been set up after the task began, or starting its span may have
    # failed.
    if running is None or running.started != started:
        return

    _running.set(running.outer)
    context.detach(running.token)

    try:
        if exception is not None:
            running.span.set_status(trace.StatusCode.ERROR, type(exception).__name__)
            running.span.record_exception(exception)
    finally:
        running.span.end()


def _add_event(app: Flask, name: str, reason: str, **extra: object) -> None:
    # A task is dropped in the context that it would have run in.
    span = trace.get_current_span()

    if span.is_recording():
        attributes = {"apitask.task": name, "apitask.reason": reason}
        span.add_event("apitask.dropped", attributes)
