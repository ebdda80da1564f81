"""What a worker of Celery imports whose spans a test wants to see, a line each."""

from __future__ import annotations

import os

from celery_app import create_app
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from flask_apitask.opentelemetry import trace_tasks


def write(span: ReadableSpan) -> str:
    """Return the line of a span."""
    return f"{span.to_json(indent=None)}\n"


lines = open(os.environ["SPANS"], "w", encoding="utf-8")
provider = TracerProvider()
provider.add_span_processor(
    SimpleSpanProcessor(ConsoleSpanExporter(out=lines, formatter=write))
)
trace.set_tracer_provider(provider)
CeleryInstrumentor().instrument()  # type: ignore[no-untyped-call]
flask_app = create_app()
trace_tasks(flask_app)
celery_app = flask_app.extensions["celery"]
