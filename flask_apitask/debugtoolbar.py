from __future__ import annotations

import functools
import pathlib
import threading
import time
import traceback
import typing as t

from flask import current_app
from flask import has_request_context
from flask import request
from flask_debugtoolbar.panels import DebugPanel

from .api import current_scope
from .api import wait
from .signals import task_dropped
from .signals import task_finished
from .signals import task_started
from .waterfall import seconds
from .waterfall import Span
from .waterfall import Waterfall

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask
    from werkzeug import Request
    from werkzeug import Response

# The key of a request's panel in its environ.
_PANEL: t.Final = "flask_apitask.panel"
_TEMPLATE: t.Final = pathlib.Path(__file__).with_suffix(".html")


class ApiTaskPanel(DebugPanel):
    """A Flask-DebugToolbar panel that shows what ran when in the current request.

    Add ``"flask_apitask.debugtoolbar.ApiTaskPanel"`` to ``DEBUG_TB_PANELS``. Like the
    toolbar, it is for development. It waits for the tasks that the request has started
    so far, so that the page can show them. So a page with the toolbar never answers
    first.
    """

    name = "ApiTask"
    has_content = True

    @classmethod
    def init_app(cls, app: Flask) -> None:
        task_started.connect(_note_start, app)
        task_finished.connect(_note_end, app)
        task_dropped.connect(_note_drop, app)

    def process_request(self, request: Request) -> None:
        self.tasks: list[Span] = []
        self._notes: list[str] = []
        self._view: Span | None = None
        self._begun = time.monotonic()
        request.environ[_PANEL] = self

    def process_view(
        self,
        request: Request,
        view_func: cabc.Callable[..., t.Any],
        view_kwargs: dict[str, t.Any],
    ) -> cabc.Callable[..., t.Any]:
        @functools.wraps(view_func)
        def observed(**kwargs: t.Any) -> t.Any:
            now = time.monotonic()
            self._view = Span("View", "view", now, now)

            try:
                return view_func(**kwargs)
            finally:
                self._view.finished = time.monotonic()

        return observed

    def process_response(self, request: Request, response: Response) -> None:
        now = time.monotonic()
        state = current_app.extensions.get("apitask")

        try:
            wait(None if state is None else state.config.timeout)
        except TimeoutError as error:
            self._notes.append(str(error))

        if (scope := current_scope()) is not None and scope.awaits_success:
            self._notes.append(
                "Tasks that wait for the success of the request start after this page."
            )

        end = Span("Wait at the end", "wait", now, now, time.monotonic())
        self._waterfall = Waterfall(self._begun, self._view, self.tasks, end)

    def nav_title(self) -> str:
        return "Tasks"

    def nav_subtitle(self) -> str:
        return self._waterfall.title

    def title(self) -> str:
        return self._waterfall.title

    def url(self) -> str:
        return ""

    def content(self) -> str:
        template = self.jinja_env.from_string(_TEMPLATE.read_text("utf-8"))
        return template.render(
            waterfall=self._waterfall, notes=self._notes, seconds=seconds
        )


def _find_tasks() -> list[Span]:
    """Return the spans of the current request's panel, or a list that nobody reads."""
    panel = request.environ.get(_PANEL) if has_request_context() else None
    return [] if panel is None else panel.tasks


def _note_start(
    app: Flask, name: str, how: str, submitted: float, started: float, **extra: object
) -> None:
    thread = threading.get_ident()
    _find_tasks().append(Span(name, how, submitted, started, thread=thread))


def _note_end(
    app: Flask, finished: float, exception: BaseException | None, **extra: object
) -> None:
    thread = threading.get_ident()

    # The last span that this thread has begun and not finished.
    for span in reversed(_find_tasks()):
        if span.thread == thread and span.finished is None:
            span.finished = finished

            if exception is not None:
                span.error = traceback.format_exception_only(exception)[-1].strip()
                span.traceback = "".join(traceback.format_exception(exception))

            break


def _note_drop(
    app: Flask, name: str, submitted: float, reason: str, **extra: object
) -> None:
    now = time.monotonic()
    span = Span(name, "dropped", submitted, now, now, error=reason)
    _find_tasks().append(span)
