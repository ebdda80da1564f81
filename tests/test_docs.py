from __future__ import annotations

import pathlib

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

    run_examples(page, caplog=caplog)


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
    assert response.json == {"receipt": "Signed up as ada@example.org"}
    assert mail.recipients == ("ada@example.org",)
    assert b"Subject: Welcome\r\n" in mail.content
    assert caplog.messages == ["signup at /signup"]
