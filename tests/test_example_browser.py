from __future__ import annotations

import itertools
import os
import pathlib
import re
import typing as t

import chromium
import pytest
from chromium import start_chromium
from conftest import wait_until
from example import Example
from example import WAYS

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from chromium import Chromium

pytestmark = pytest.mark.skipif(
    chromium.DRIVER is None and os.environ.get("APITASK_REQUIRE_SERVICES") != "1",
    reason="chromedriver is not installed (Debian: chromium-driver)",
)

# What each chart shows; places and widths are shares of the chart's width.
CHARTS = """[...document.querySelectorAll("article")].map(article => {
  const {left, width} = article.querySelector("ol").getBoundingClientRect();
  const place = element => {
    const box = element.getBoundingClientRect();
    return [(box.left - left) / width, box.width / width];
  };
  return {
    way: article.id,
    box: article.getBoundingClientRect().toJSON(),
    seconds: Number(article.querySelector("data").value),
    text: article.innerText,
    labels: [...article.querySelectorAll("li")].map(item => item.innerText),
    bars: [...article.querySelectorAll("i")].map(place),
    response: place(article.querySelector(".response"))[0],
  };
})"""
# How long each sign-up took for the browser itself, in seconds.
TIMINGS = """Object.fromEntries(performance.getEntriesByType("resource")
  .filter(entry => entry.name.endsWith("/signup"))
  .map(entry => [entry.name.split("/").at(-2), entry.duration / 1000]))"""
VALUE = "document.querySelector('#address').value"


@pytest.fixture
def url() -> cabc.Iterator[str]:
    """Start the example application, and return its address."""
    with Example() as example:
        yield example.address()


@pytest.fixture(scope="module")
def browser() -> cabc.Iterator[Chromium]:
    """Start a browser."""
    with start_chromium() as browser:
        yield browser


def sign_up(browser: Chromium) -> None:
    """Click the button, and wait for all that is drawn then."""
    browser.click("[type=submit]")
    browser.wait_for("#answer-first data")
    wait_until(lambda: browser.text("[role=status]").startswith("Done"))


def test_button_draws_three_waterfalls(browser: Chromium, url: str) -> None:
    """One click draws the three ways side by side, in proportion to the real times."""
    browser.resize(1280, 900)
    browser.open(url)
    assert browser.text("h1") == "One sign-up, three ways"
    assert "Flask-ApiTask" in browser.text("p")
    assert browser.evaluate("document.querySelectorAll('article').length") == 3
    sign_up(browser)
    charts = browser.evaluate(CHARTS)
    assert [chart["way"] for chart in charts] == WAYS

    for left, right in itertools.pairwise(charts):
        assert left["box"]["top"] == right["box"]["top"]
        assert left["box"]["right"] < right["box"]["left"]

    plain, background, first = (chart["seconds"] for chart in charts)
    assert plain > background > first
    timings = browser.evaluate(TIMINGS)
    assert timings["plain"] > timings["background"] > timings["answer-first"]
    scale = charts[0]["response"] / plain

    for chart in charts:
        assert chart["seconds"] <= timings[chart["way"]]
        assert chart["response"] == pytest.approx(chart["seconds"] * scale, abs=0.01)
        assert len(chart["bars"]) == len(chart["labels"]) == 5

        for label, (x, width) in zip(chart["labels"], chart["bars"], strict=True):
            assert width == pytest.approx(read_seconds(label) * scale, abs=0.01)
            assert 0 <= x <= x + width <= 1.001

    assert "faster" not in charts[0]["text"]
    assert f"{plain / background:.1f} times faster" in charts[1]["text"]
    assert f"{plain / first:.1f} times faster" in charts[2]["text"]


def read_seconds(label: str) -> float:
    """Return how long a label says that something took."""
    match = re.search(r"· ([\d.]+) (ms|s)\b", label)
    assert match is not None
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def test_mail_that_fails(browser: Chromium, url: str) -> None:
    """An address that is refused can be chosen, and its log is beside the bars."""
    browser.open(url)
    browser.click("[type=button]")
    assert browser.evaluate(VALUE) == "refused@example.org"
    sign_up(browser)
    assert "ERROR: Exception on /signup [POST]" in browser.text("#plain div pre")
    assert "Status 500" in browser.text("#plain")

    for way in WAYS[1:]:
        log = browser.text(f"#{way} div pre")
        assert "ERROR: Task 'flask_mail.send' of POST /signup failed after" in log
        assert "No such user" in log
        assert "Status 201" in browser.text(f"#{way}")
        # Than what has failed is no praise.
        assert "faster" not in browser.text(f"#{way}")
        failed = f"document.querySelectorAll('#{way} .failed').length"
        assert browser.evaluate(failed) == 1


def test_keyboard(browser: Chromium, url: str) -> None:
    """Enter in the field signs up, the focus stays there, and all has a name."""
    browser.open(url)
    assert browser.label("#address") == "E-mail address"
    assert browser.label("[type=submit]") == "Sign up with each way"
    browser.type("#address", "\ue007")
    done = "Done: the times are below."
    wait_until(lambda: browser.text("[role=status]") == done)
    browser.wait_for("#answer-first data")
    assert browser.evaluate("document.activeElement.id") == "address"


def test_code_of_the_view(browser: Chromium, url: str) -> None:
    """The page shows the code that it has run."""
    browser.open(url)
    browser.click("body > details summary")
    code = browser.text("body > details pre")
    assert '@service.post("/signup")' in code
    assert "mail.send(" in code
    assert "run(audit, " in code


@pytest.mark.parametrize(
    "entered",
    ["name@example", """'"><img src=x onerror="document.title = 'hacked'">@a.org"""],
)
def test_error_is_told(browser: Chromium, url: str, entered: str) -> None:
    """What is no address is kept, said to be none, and does not become markup."""
    browser.open(url)
    browser.evaluate("document.forms[0].noValidate = true")
    browser.evaluate("document.querySelector('#address').value = ''")
    browser.type("#address", entered)
    browser.click("[type=submit]")
    text = "Enter an address like name@example.org."
    wait_until(lambda: browser.text("[role=status]") == text)
    assert browser.evaluate(VALUE) == entered
    assert browser.evaluate("document.querySelectorAll('img, data').length") == 0


def test_narrow_window(browser: Chromium, url: str) -> None:
    """A narrow window shows all in its width, stacked, whatever was entered."""
    browser.resize(320, 800)
    browser.open(url)
    browser.evaluate("document.querySelector('#address').value = ''")
    browser.type("#address", f"{'long' * 15}@example.org")
    sign_up(browser)

    for opened in ("#results details", "body > details"):
        browser.click(f"{opened} summary")

    assert browser.evaluate("window.innerWidth") == 320
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    boxes = [chart["box"] for chart in browser.evaluate(CHARTS)]
    assert boxes[0]["bottom"] < boxes[1]["top"]
    assert boxes[1]["bottom"] < boxes[2]["top"]


@pytest.mark.parametrize(("scheme", "text"), [("light", 0), ("dark", 255)])
def test_screenshot(browser: Chromium, url: str, scheme: str, text: int) -> None:
    """The page follows the colour scheme; ``APITASK_SCREENSHOTS`` keeps its picture."""
    browser.prefer(scheme)
    browser.resize(1000, 600)
    browser.open(url)
    sign_up(browser)
    color = "getComputedStyle(document.querySelector('article')).color"
    assert browser.evaluate(color) == f"rgb({text}, {text}, {text})"
    ways = "document.querySelector('#ways').getBoundingClientRect().bottom"
    browser.resize(1000, browser.evaluate(f"Math.floor({ways})"))
    # No scroll bar in the picture.
    browser.evaluate("document.documentElement.style.overflow = 'hidden'")
    picture = browser.screenshot()
    assert len(picture) < 150_000

    if folder := os.environ.get("APITASK_SCREENSHOTS"):
        pathlib.Path(folder, f"example-{scheme}.png").write_bytes(picture)
