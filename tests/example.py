from __future__ import annotations

import contextlib
import html
import http.client
import pathlib
import re
import sys
import typing as t
import urllib.parse

from child_process import ChildProcess
from child_process import PATIENCE

if t.TYPE_CHECKING:
    import collections.abc as cabc

SCRIPT = pathlib.Path(__file__).parents[1] / "example_app.py"


class Page(t.NamedTuple):
    """A response of the example application."""

    status: int
    location: str | None
    text: str

    @property
    def mails(self) -> list[tuple[str, ...]]:
        """The subject, recipient and text of the mails on the page, newest first."""
        pattern = r"<article><h2>(.*)</h2>\s*<p>To (.*)</p><p>(.*)\s*</p></article>"
        found = re.findall(pattern, self.text)
        return [tuple(html.unescape(field).strip() for field in one) for one in found]

    @property
    def audit(self) -> list[tuple[str, ...]]:
        """The user and the client's address in the rows of the audit."""
        return re.findall(r"<li>.*: user (\d+) signed up from (.*)</li>", self.text)

    @property
    def error(self) -> str | None:
        """What is said of the address that was entered."""
        match = re.search(r'<p class="error" id="error">(.*)</p>', self.text)
        return None if match is None else match[1]

    def seconds(self, background: str) -> float:
        """Return what the last sign-up took with the background ``on`` or ``off``."""
        pattern = rf'<div id="{background}">\s*<dt>.*</dt>\s*<dd><data value="(.*?)">'
        match = re.search(pattern, self.text)
        assert match is not None
        return float(match[1])


class Example(ChildProcess):
    """The example application, started as users do, with all warnings as errors."""

    def __init__(self, **environ: str) -> None:
        super().__init__([sys.executable, "-W", "error", str(SCRIPT)], environ)

    def address(self) -> str:
        """Wait for the address that it prints, and return it."""
        return self.expect(r"Running on (http://127\.0\.0\.1:\d+)")


def fetch(url: str, fields: cabc.Mapping[str, str] | None = None) -> Page:
    """Get a page, or send a form, and do not follow where the response leads to."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=PATIENCE)

    with contextlib.closing(connection):
        if fields is None:
            connection.request("GET", f"{address.path}?{address.query}")
        else:
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request(
                "POST", address.path, urllib.parse.urlencode(fields), form
            )

        response = connection.getresponse()
        text = response.read().decode()
        return Page(response.status, response.headers["Location"], text)
