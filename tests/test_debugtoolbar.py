from __future__ import annotations

import html.parser
import logging
import os
import subprocess
import sys
import threading
import typing as t

import chromium
import flask
import pytest
from chromium import start_chromium
from conftest import PATIENCE
from conftest import wait_until
from scopes import Gate
from werkzeug.serving import make_server
from werkzeug.serving import WSGIRequestHandler

from flask_apitask import run
from flask_apitask import scoped
from flask_apitask.context import MERGED

if os.environ.get("APITASK_REQUIRE_SERVICES") != "1":
    pytest.importorskip("flask_debugtoolbar")

from flask_debugtoolbar import DebugToolbarExtension
from panel_app import make_panel_app
from panel_app import MARKUP
from panel_app import PAGE

from flask_apitask.waterfall import Span
from flask_apitask.waterfall import Waterfall

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from chromium import Chromium
    from flask import Flask


class QuietHandler(WSGIRequestHandler):
    """A handler that writes nothing about a request."""

    def log(self, *args: object) -> None:
        """Write nothing."""


# It replaces a method of the app, which has one more parameter since Flask 3.2.
pytestmark = pytest.mark.skipif(
    MERGED, reason="Flask-DebugToolbar does not work on Flask 3.2 yet"
)

in_browser = pytest.mark.skipif(
    chromium.DRIVER is None and os.environ.get("APITASK_REQUIRE_SERVICES") != "1",
    reason="chromedriver is not installed (Debian: chromium-driver)",
)

ROOT = "document.documentElement"
PANEL = "#flDebugApiTaskPanel-content"

# The least contrast between a text and its background, after WCAG 2.
LEAST_CONTRAST = """(() => {
  const read = color => color.match(/[0-9.]+/g).map(Number);
  const light = color => read(color).slice(0, 3)
    .map(part => part / 255)
    .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = element => {
    const color = getComputedStyle(element).backgroundColor;
    return (read(color)[3] ?? 1) ? color : behind(element.parentElement);
  };
  const contrast = (one, other) => {
    const [a, b] = [light(one), light(other)].sort((a, b) => b - a);
    return (a + 0.05) / (b + 0.05);
  };
  const panel = document.querySelector(".apitask");
  const html = [...panel.querySelectorAll("p, th, td, summary, pre, caption")]
    .map(element => contrast(getComputedStyle(element).color, behind(element)));
  const label = getComputedStyle(panel.querySelector("text")).fill;
  const bars = [...panel.querySelectorAll("rect:not(.queued)")]
    .map(bar => contrast(label, getComputedStyle(bar).fill));
  return Math.min(...html, ...bars);
})()"""


class Page(html.parser.HTMLParser):
    """The table of the panel, the classes of its bars, and all elements' names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.bars: list[str] = []
        self.elements: list[str] = []
        self._cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

        if tag == "rect":
            self.bars.append(dict(attrs)["class"] or "")

        if tag == "tr":
            self.rows.append([])

        if tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += " " + " ".join(data.split())

    @property
    def table(self) -> list[list[str]]:
        """Names, how they ran, and the outcome, without the head."""
        return [[cell.strip() for cell in row[:3]] for row in self.rows[1:]]


def get(app: Flask, path: str) -> Page:
    """Return the page, with the panel."""
    return Page(app.test_client().get(path).text)


def bars(page: Page) -> list[str]:
    """Return the outcomes of the bars, without the lines before them."""
    return [bar for bar in page.bars if bar != "queued"]


def test_tasks_that_end_after_the_view(caplog: pytest.LogCaptureFixture) -> None:
    """The panel has the view, each task however it ended, and the wait at the end."""
    page = get(make_panel_app(), "/")
    assert bars(page) == ["view", "done", "done", "failed", "wait"]
    first, second, failed = page.table
    assert first == second == ["mailer.welcome", "thread", "done"]
    assert failed[:2] == [MARKUP, "thread"]
    assert failed[2].startswith(f"failed LookupError: {MARKUP} Traceback ")
    assert "raise LookupError(text)" in failed[2]


def test_markup_stays_text(caplog: pytest.LogCaptureFixture) -> None:
    """Markup in the name of a task and in its exception is shown as it is."""
    text = make_panel_app().test_client().get("/").text
    assert "img" not in Page(text).elements
    assert "<img" not in text
    assert "&lt;img src=x onerror" in text


def test_title() -> None:
    """The title has the count of the tasks, and what they may have saved."""
    view, end = Span("View", "view", 1, 1, 2), Span("Wait", "wait", 2, 2, 2.25)
    tasks = [Span("a", "thread", 1, 1, 2.25), Span("b", "inline", 1, 1, 1.5)]
    assert Waterfall(1, view, tasks, end).title == "2 tasks, up to 1.00 s saved"
    assert Waterfall(1, view, tasks[1:], end).title == "1 task"
    assert Waterfall(1, None, [], end).title == "0 tasks"
    text = make_panel_app().test_client().get("/none").text
    assert "<small>0 tasks</small>" in text


def test_places_on_the_time_line() -> None:
    """A bar is where its task ran; a line before it is where the task was queued."""
    view, end = Span("View", "view", 10, 10, 12), Span("Wait", "wait", 12, 12, 14)
    queued = Span("late", "thread", 11, 13, 14)
    early = Span("early", "inline", 10, 10, 10)
    running = Span("running", "thread", 11, 12)
    waterfall = Waterfall(10, view, [queued, early, running], end)
    rows = {row.label: row for row in waterfall.rows}
    labels = ["View", "early", "late", "running", "Wait"]
    assert [label.partition(" ")[0] for label in rows] == labels
    late = rows["late · 1.00 s"]
    assert (late.queued_x, late.queued_width, late.x, late.width) == (25, 50, 75, 25)
    assert rows["early · 0.0 ms · inline"].width > 0
    assert rows["running · 2.00 s · running"].outcome == "running"
    assert waterfall.offset(queued) == "3.00 s"
    assert [tick[1] for tick in waterfall.ticks] == ["0.0 ms", "2.00 s", "4.00 s"]
    assert Waterfall(10, None, [early], Span("", "wait", 10, 10, 10)).rows


def test_how_a_task_ran(caplog: pytest.LogCaptureFixture) -> None:
    """A cancelled task is shown as dropped, and a note mentions those yet to start."""
    client = make_panel_app(APITASK_MAX_WORKERS=1).test_client()
    text = client.get("/dropped").text
    page = Page(text)
    assert page.table[0] == ["mailer.welcome", "thread", "done"]
    dropped = ["mailer.welcome", "dropped", "dropped (it was cancelled)"]
    assert page.table[1] == dropped
    assert bars(page) == ["view", "done", "dropped", "wait"]
    assert "Tasks that wait for the success of the request start" in text


def test_tasks_of_other_code() -> None:
    """A plain call is shown as one; a task outside of any request is on no page."""
    app = make_panel_app(APITASK_ENABLED=False)

    with app.app_context():
        assert run(sum, [1, 2]).result() == 3

    page = get(app, "/redirect")
    assert page.table == [["mailer.welcome", "inline", "done"]]


@pytest.mark.parametrize("path", ["/redirect", "/missing"])
def test_pages_that_are_no_view(path: str) -> None:
    """A redirect that was intercepted, and an error page, have the panel too."""
    page = get(make_panel_app(), path)
    assert page.table == [["mailer.welcome", "thread", "done"]]
    view = ["view"] if path == "/redirect" else []
    assert bars(page) == [*view, "done", "wait"]


def test_nested_and_failing_views() -> None:
    """A view that fails was a view; a task of a scoped view and in a task is shown."""
    app = make_panel_app(PROPAGATE_EXCEPTIONS=False)
    app.register_error_handler(KeyError, lambda error: (PAGE, 500))

    def outer() -> None:
        run(dict)

    @app.get("/scoped")
    @scoped
    def view() -> str:
        run(outer)
        raise KeyError

    page = get(app, "/scoped")
    assert [row[1] for row in page.table] == ["thread", "inline"]
    assert bars(page) == ["view", "done", "done", "wait"]


def test_deadline(caplog: pytest.LogCaptureFixture) -> None:
    """The page waits no longer than the request would, and says what is left."""
    app, gate = make_panel_app(APITASK_TIMEOUT=0.05), Gate()

    @app.get("/stuck")
    def stuck() -> str:
        run(gate)
        assert gate.begun.wait(PATIENCE)
        return PAGE

    text = app.test_client().get("/stuck").text
    gate.opened.set()
    gate.threads[0].join(0.01)
    assert "1 of the scope&#39;s tasks were not done after 0.05 s." in text
    assert Page(text).table[0][2] == "running"


def test_app_without_apitask() -> None:
    """The panel works in an app that has forgotten its ApiTask."""
    app = flask.Flask(__name__)
    app.debug = True
    app.config["SECRET_KEY"] = "only for a test"
    app.config["DEBUG_TB_PANELS"] = ["flask_apitask.debugtoolbar.ApiTaskPanel"]
    DebugToolbarExtension(app)
    app.add_url_rule("/", view_func=lambda: PAGE)
    assert "<small>0 tasks</small>" in app.test_client().get("/").text


def test_nothing_is_loaded_while_the_toolbar_is_off() -> None:
    """Without debug mode the panel's module is not imported, and no signal is heard."""
    script = """
import sys, flask, flask_debugtoolbar
from flask_apitask import ApiTask, task_started
app = flask.Flask("app")
app.config["DEBUG_TB_PANELS"] = ["flask_apitask.debugtoolbar.ApiTaskPanel"]
flask_debugtoolbar.DebugToolbarExtension(app)
ApiTask(app)
assert "flask_apitask.debugtoolbar" not in sys.modules
assert not task_started.receivers
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[str]:
    """Serve the app, and return its address."""
    app = make_panel_app()
    monkeypatch.setattr(app.logger, "propagate", False)
    monkeypatch.setattr(app.logger, "handlers", [logging.NullHandler()])
    server = make_server("127.0.0.1", 0, app, True, request_handler=QuietHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(PATIENCE)
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> cabc.Iterator[Chromium]:
    """Start a browser."""
    with start_chromium() as browser:
        yield browser


def show(browser: Chromium, address: str, width: int) -> None:
    """Load a page, and open the panel as its readers do."""
    browser.resize(width, 800)
    browser.open(address)
    # Its script loads its style sheet.
    style = "getComputedStyle(document.querySelector('#flDebugToolbar'))"
    wait_until(lambda: browser.evaluate(f"{style}.position") == "fixed")
    browser.click("a.flDebugApiTaskPanel")
    browser.wait_for(f"{PANEL}[style*=block]")


@in_browser
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("path", ["/", "/many"])
def test_panel_in_a_browser(browser: Chromium, url: str, path: str, width: int) -> None:
    """The panel fits a phone and a screen, has a name, and runs no markup."""
    show(browser, url + path, width)
    assert browser.evaluate("document.title") == "Page"
    assert browser.evaluate(f"{ROOT}.scrollWidth - {ROOT}.clientWidth") == 0
    count = browser.evaluate(f"document.querySelectorAll('{PANEL} tbody tr').length")
    assert count == (3 if path == "/" else 500)
    label = browser.label(f"{PANEL} svg")
    assert label.startswith(f"{count} tasks, up to ")
    box = f"document.querySelector('{PANEL} .apitask').getBoundingClientRect()"
    assert browser.evaluate(f"{box}.width") > width * 0.75
    scroll = f"document.querySelector('{PANEL} .flDebugScroll')"
    assert browser.evaluate(f"{scroll}.scrollWidth - {scroll}.clientWidth") == 0


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Chromium, url: str, scheme: str) -> None:
    """All text stands out from its background, in light colours and in dark ones."""
    browser.prefer(scheme)
    show(browser, f"{url}/", 1200)
    assert browser.evaluate(LEAST_CONTRAST) >= 4.5
    background = f"getComputedStyle(document.querySelector('{PANEL}')).backgroundColor"
    is_light = browser.evaluate(background) == "rgb(255, 255, 255)"
    assert is_light is (scheme == "light")


@in_browser
def test_traceback_by_keyboard(browser: Chromium, url: str) -> None:
    """A traceback is folded, and a key opens it."""
    show(browser, f"{url}/", 360)
    assert not browser.evaluate(f"document.querySelector('{PANEL} details').open")
    browser.type(f"{PANEL} summary", "\ue007")
    assert browser.evaluate(f"document.querySelector('{PANEL} details').open")
    assert "raise LookupError(text)" in browser.text(f"{PANEL} pre")
