from __future__ import annotations

import os
import typing as t

import chromium
import pytest
from chromium import start_chromium
from example import Example

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from chromium import Chromium

pytestmark = pytest.mark.skipif(
    chromium.DRIVER is None and os.environ.get("APITASK_REQUIRE_SERVICES") != "1",
    reason="chromedriver is not installed (Debian: chromium-driver)",
)


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


def sign_up(browser: Chromium, address: str) -> None:
    """Fill in the form that is open, send it, and wait for the answer."""
    browser.type("#address", address)
    browser.click("[name=newsletter]")
    browser.click("form button")
    browser.wait_for("[role=status]:not(:empty), #error")


def test_switch_and_times(browser: Chromium, url: str) -> None:
    """Who signs up in both modes sees both times side by side, and as bars."""
    browser.open(url)
    assert browser.text("[aria-current]") == "On"
    assert browser.text("#on dd") == browser.text("#off dd") == "not known yet"
    sign_up(browser, "on@example.org")
    assert browser.text("[role=status]") == "You are signed up."
    browser.click("[href='/off/']")
    assert browser.text("[href='/off/'][aria-current]") == "Off"
    sign_up(browser, "off@example.org")
    assert browser.text("[role=status]") == "You are signed up."
    assert browser.text("[aria-current]") == "Off"
    browser.resize(1000, 800)
    on, off = (box(browser, f"#{mode}") for mode in ["on", "off"])
    assert on["top"] == off["top"]
    assert on["right"] < off["left"]
    bar = box(browser, "#on .bar")["width"] / box(browser, "#off .bar")["width"]
    value = "Number(document.querySelector('#{} data').value)"
    times = f"{value.format('on')} / {value.format('off')}"
    assert bar == pytest.approx(browser.evaluate(times), rel=0.05)
    browser.click("[href='/off/inbox']")
    browser.wait_for("article")
    assert browser.evaluate("document.querySelectorAll('article').length") == 6


def test_reload_sends_nothing(browser: Chromium, url: str) -> None:
    """To load the page again after signing up signs nobody up a second time."""
    browser.open(url)
    sign_up(browser, "reload@example.org")
    browser.reload()
    assert browser.text("[role=status]") == "You are signed up."
    assert browser.evaluate("document.querySelector('#error')") is None


def test_error_is_told_at_the_field(browser: Chromium, url: str) -> None:
    """After an error the field has the focus, what was entered, and the reason."""
    for _ in range(2):
        browser.open(url)
        sign_up(browser, "error@example.org")

    assert browser.text("#error") == "This address is signed up already."
    field = "#address:focus[aria-invalid=true][aria-describedby=error]"
    assert browser.label(field) == "E-mail address"
    value = "document.querySelector('#address').value"
    assert browser.evaluate(value) == "error@example.org"
    assert browser.evaluate("document.querySelector('[name=newsletter]').checked")
    assert browser.evaluate("document.title") == "Error: Sign up"


def test_markup_stays_text(browser: Chromium, url: str) -> None:
    """Markup that is entered does not become a part of the page."""
    text = """'"><img src=x onerror="document.title = 'hacked'">"""
    browser.open(url)
    browser.evaluate("document.forms[0].noValidate = true")
    sign_up(browser, text)
    assert browser.text("#error") == "Enter an address like name@example.org."
    assert browser.evaluate("document.querySelector('#address').value") == text
    assert browser.evaluate("document.images.length") == 0


@pytest.mark.parametrize("path", ["/", "/inbox"])
def test_narrow_window(browser: Chromium, url: str, path: str) -> None:
    """A narrow window shows a page in all its width, whatever was entered."""
    browser.open(url)
    sign_up(browser, f"{'long' * 15}{len(path)}@example.org")
    browser.resize(320, 800)
    browser.open(url + path)
    assert browser.evaluate("window.innerWidth") == 320
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0


def box(browser: Chromium, selector: str) -> dict[str, float]:
    """Return where an element is on the page, in pixels."""
    expression = f"document.querySelector('{selector}').getBoundingClientRect()"
    found: dict[str, float] = browser.evaluate(f"{expression}.toJSON()")
    return found
