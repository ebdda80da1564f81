from __future__ import annotations

import contextlib
import html
import http.client
import pathlib
import re
import sqlite3
import sys
import typing as t
import urllib.parse

from child_process import ChildProcess
from child_process import PATIENCE

if t.TYPE_CHECKING:
    import collections.abc as cabc

SCRIPT = pathlib.Path(__file__).parents[1] / "example_app.py"
WAYS = ["plain", "background", "answer-first"]


class Bar(t.NamedTuple):
    """A bar of a waterfall; where it begins and how wide it is, in per cent."""

    label: str
    outcome: str
    x: float
    width: float

    @property
    def name(self) -> str:
        return self.label.partition(" · ")[0]

    @property
    def seconds(self) -> float:
        """What the label says that it took."""
        match = re.search(r" · ([\d.]+) (ms|s)\b", self.label)
        assert match is not None
        return float(match[1]) / (1000 if match[2] == "ms" else 1)


class Way(t.NamedTuple):
    """The last sign-up in one of the ways, as the page shows it."""

    status: int
    seconds: float
    faster: float | None
    bars: list[Bar]
    response: float
    log: list[str]


class Page(t.NamedTuple):
    """A response of the example application."""

    status: int
    text: str

    @property
    def mails(self) -> list[tuple[str, ...]]:
        """The subject, recipient and text of the mails on the page, newest first."""
        found = re.findall(r"<p>(.*), to (.*): (.*)\s*</p>", self.text)
        return [tuple(html.unescape(field).strip() for field in one) for one in found]

    def way(self, name: str) -> Way:
        """Return the last sign-up in a way."""
        match = re.search(rf'<article id="{name}">.*?</article>', self.text, re.S)
        assert match is not None
        article = match[0]
        seconds = re.search(r'<data value="(.*?)">', article)
        status = re.search(r"<p>Status (\d+),", article)
        faster = re.search(r"([\d.]+) times faster", article)
        bars = re.findall(
            r"<li><span>(.*?)</span><i class="
            r'"(.*?)"\s+style="margin-left: (.*?)%; width: (.*?)%">',
            article,
        )
        response = re.search(r'<div class="response" style="left: (.*?)%">', article)
        log = re.search(r"<div>(.*?)</div>", article, re.S)
        assert seconds is not None
        assert status is not None
        assert response is not None
        assert log is not None
        return Way(
            int(status[1]),
            float(seconds[1]),
            None if faster is None else float(faster[1]),
            [Bar(html.unescape(bar[0]), bar[1], *map(float, bar[2:])) for bar in bars],
            float(response[1]),
            [
                html.unescape(text)
                for text in re.findall("<pre>(.*?)</pre>", log[1], re.S)
            ],
        )


class Example(ChildProcess):
    """The example application, started as users do, with all warnings as errors."""

    def __init__(self, **environ: str) -> None:
        super().__init__([sys.executable, "-W", "error", str(SCRIPT)], environ)

    def address(self) -> str:
        """Wait for the address that it prints, and return it."""
        return self.expect(r"Running on (http://127\.0\.0\.1:\d+)")


def fetch(url: str, fields: cabc.Mapping[str, str] | None = None) -> Page:
    """Get a page, or send a form."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=PATIENCE)

    with contextlib.closing(connection):
        if fields is None:
            connection.request("GET", address.path or "/")
        else:
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request(
                "POST", address.path, urllib.parse.urlencode(fields), form
            )

        response = connection.getresponse()
        return Page(response.status, response.read().decode())


def read_audit(database: pathlib.Path) -> list[tuple[str, str]]:
    """Return the addresses that have signed up, and from where, in order."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT * FROM audit").fetchall()
