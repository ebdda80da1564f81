from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from smtp_servers import ScriptedServer
from sybil.document import Document
from sybil.parsers.myst import PythonCodeBlockParser

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    path
    for path in [README, *ROOT.joinpath("docs").glob("*.md")]
    if "```python\n" in path.read_text("utf-8")
)
# What these packages patch or keep in the process is not for other tests.
ALONE = {
    "monitoring.md": [
        "opentelemetry.instrumentation.flask",
        "opentelemetry.sdk",
        "prometheus_client",
        "sentry_sdk",
        "structlog",
    ]
}


def run_examples(page: pathlib.Path, **names: object) -> Document:
    """Run the Python blocks of a page in order, hidden ones too, and return it."""
    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace.update(names, __name__=f"docs_{page.stem}")

    for example in document:
        example.evaluate()

    return document


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every Python example runs, and does what the page's hidden checks say."""
    if "flask_mailman" in page.read_text("utf-8"):
        pytest.importorskip("flask_mailman")

    if page.name not in ALONE:
        run_examples(page, caplog=caplog)
        return

    for package in ALONE[page.name]:
        if os.environ.get("APITASK_REQUIRE_SERVICES") != "1":
            pytest.importorskip(package)

    code = (
        "import pathlib, sys, test_docs as t; t.run_examples(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(page)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environ, timeout=60)


def test_quick_start_delivers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The README's app has its mail delivered by the time it has answered."""
    with ScriptedServer() as server:
        monkeypatch.setenv("FLASK_MAIL_PORT", str(server.settings().port))
        monkeypatch.setenv("FLASK_APITASK_MAIL_KEEPALIVE", "0")
        client = run_examples(README).namespace["app"].test_client()
        response = client.post("/signup", data={"email": "ada@example.org"})
        (mail,) = server.taken

    assert response.status_code == 201
    assert response.text == "You are signed up."
    assert mail.recipients == ("ada@example.org",)
    assert b"Subject: Welcome\r\n" in mail.content
    assert caplog.messages == ["signup at /signup"]
