from __future__ import annotations

import os
import pathlib
import re
import xml.etree.ElementTree as ET

import pytest
from chromium import DRIVER
from chromium import start_chromium

PICTURE = pathlib.Path(__file__).parents[1] / "docs" / "timeline.svg"
UNITS_PER_MS = 0.38
SVG = "{http://www.w3.org/2000/svg}"
# What each kind of bar takes in all: the view, two mails and a webhook.
WORK = {"view": 100, "mail": 600, "hook": 200}

needs_chromium = pytest.mark.skipif(
    DRIVER is None and os.environ.get("APITASK_REQUIRE_SERVICES") != "1",
    reason="chromedriver is not installed (Debian: chromium-driver)",
)


@pytest.mark.parametrize("way", ["plain", "background", "answer-first"])
def test_bars_show_what_the_text_says(way: str) -> None:
    """The same work is drawn in all ways, and the response where the text says."""
    group = ET.parse(PICTURE).find(f".//{SVG}g[@id='{way}']")
    assert group is not None
    bars = [
        (bar.get("class", ""), float(bar.get("x", "")), float(bar.get("width", "")))
        for bar in group.iter(f"{SVG}rect")
    ]
    drawn = {
        kind: sum(width for name, _, width in bars if name == kind) / UNITS_PER_MS
        for kind in WORK
    }
    assert drawn == pytest.approx(WORK)

    ends = {
        kind: max(x + width for name, x, width in bars if name == kind) / UNITS_PER_MS
        for kind in WORK
    }
    end = ends["view"] if way == "answer-first" else max(ends.values())
    line = group.find(f"{SVG}path[@class='response']")
    assert line is not None
    position = re.match(r"M([\d.]+) ", line.get("d", ""))
    assert position is not None
    assert float(position[1]) / UNITS_PER_MS == pytest.approx(end)
    assert f"response after {end:.0f} ms" in "".join(group.itertext())


@needs_chromium
def test_picture_is_readable_on_a_phone() -> None:
    """At 360 pixels all text is inside and large enough, light on dark or dark."""
    with start_chromium() as browser:
        browser.resize(360, 480)
        browser.open(PICTURE.as_uri())

        # As an <img> that fills the screen: the browser keeps the shape.
        for name, value in {"width": "360", "height": "312"}.items():
            root = "document.documentElement"
            browser.evaluate(f"{root}.setAttribute('{name}', {value})")

        boxes = browser.evaluate(
            "[...document.querySelectorAll('text')].map(text => {"
            " const box = text.getBoundingClientRect();"
            " return [box.left, box.right, parseFloat(getComputedStyle(text).fontSize)]"
            "})"
        )
        assert len(boxes) > 15
        assert all(left >= 0 and right <= 360 for left, right, _ in boxes)
        assert min(size for *_, size in boxes) >= 12

        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            page, text = (
                browser.evaluate(
                    f"getComputedStyle(document.querySelector('{selector}')).fill"
                )
                for selector in (".page", ".name")
            )
            brightness = [
                sum(map(int, re.findall(r"\d+", fill)[:3])) / 3 for fill in (page, text)
            ]
            assert (brightness[0] > brightness[1]) == (scheme == "light")
            assert abs(brightness[0] - brightness[1]) > 128
