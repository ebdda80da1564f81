from __future__ import annotations

import ast
import pathlib
import re
import threading

import pytest
from conftest import PATIENCE
from flask import Flask

from flask_apitask import ApiTask
from flask_apitask import run

ROOT = pathlib.Path(__file__).parents[1]
# What formats a value: of the % operator, and of str.format(). That of an f-string is
# a node of its own.
FIELD = re.compile(r"%(?:\.\d)?[srdf]|\{\}|\0")
# What the outcome of a task is put into.
AROUND = "Task %r%s %s."
# Characters of a text that are its own, below which anything would fit.
OWN = 12
LOGGING = {"log", "log_once", "_log", "_log_task", "warn_without_apitask"}
# It logs only where an executor is used without an app.
BARE = "executor/runner.py"


def find_texts(path: pathlib.Path) -> list[str]:
    """Return what a module has in quotes, with each field of an f-string as a null."""
    found = []

    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append(join(node))

    return found


def join(node: ast.expr) -> str:
    """Return the text of a literal, with a null in place of each field."""
    if isinstance(node, ast.Constant):
        return str(node.value)

    assert isinstance(node, ast.JoinedStr)
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else "\0"
        for part in node.values
    )


def to_pattern(text: str) -> str:
    """Return the expression for what the first paragraph of a text may become."""
    return ".*".join(map(re.escape, FIELD.split(text.partition("\n\n")[0])))


def is_sentence(text: str) -> bool:
    """Tell whether a text has words enough of its own."""
    return " " in text and len(FIELD.sub("", text)) >= OWN


SOURCES = sorted(ROOT.joinpath("flask_apitask").rglob("*.py"))
TEXTS = {text for path in SOURCES for text in find_texts(path)}
PATTERNS = [re.compile(to_pattern(text)) for text in TEXTS if is_sentence(text)]


def find_blocks(name: str) -> list[str]:
    """Return the paragraphs of the text blocks of a page, each as one line."""
    page = ROOT.joinpath("docs", name).read_text("utf-8")
    blocks = re.findall(r"^.{0,4}```text\n(.*?)^ *```$", page, re.M | re.S)
    texts = [text for block in blocks for text in re.split(r"\n\s*\n", block)]
    return [" ".join(text.split()) for text in texts]


def is_known(text: str) -> bool:
    """Tell whether the package writes a text like this."""
    assert AROUND in TEXTS
    outcome = re.fullmatch(
        r"Task '[\w.]+'(?: of [A-Z]+ /\S*)? ((?:failed|was) .*)\.", text
    )
    parts = {text, outcome[1]} if outcome else {text}
    return any(pattern.fullmatch(part) for pattern in PATTERNS for part in parts)


def test_a_text_that_is_not_ours_is_not_known() -> None:
    """The check can fail: one changed word is enough."""
    ours = "Task 'shop.fail' of GET /fails failed after 0.012 s."
    assert is_known(ours)
    assert not is_known(ours.replace("after", "in"))
    assert not is_known("Unknown configuration key APITASK_TIMOUT, you know.")


@pytest.mark.parametrize("page", ["errors.md", "troubleshooting.md"])
def test_texts_are_those_of_the_package(page: str) -> None:
    """What a page quotes from the log, or of an exception, is what the package says."""
    lines = find_blocks(page)
    assert len(lines) > 10
    assert [line for line in lines if not is_known(line)] == []


def is_logging(node: ast.AST) -> bool:
    """Tell whether this is a call that logs above DEBUG."""
    if not isinstance(node, ast.Call):
        return False

    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name in LOGGING and "DEBUG" not in ast.unparse(node)


def find_logged(path: pathlib.Path) -> set[str]:
    """Return the texts that a module logs, and those that become a part of one."""
    tree = ast.parse(path.read_text("utf-8"))
    found: list[ast.AST] = []

    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue

        nodes = list(ast.walk(function))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        logging = [call for call in calls if is_logging(call)]
        # What another function yields for it to log, as find_mistakes() does.
        yielded = [node.value for node in nodes if isinstance(node, ast.Yield)]
        found += [argument for call in logging for argument in call.args]
        found += filter(None, yielded)
        names = {node.id for node in found if isinstance(node, ast.Name)}
        found += [
            node.value
            for node in [*tree.body, *nodes]
            if isinstance(node, ast.Assign)
            and names & {getattr(target, "id", "") for target in node.targets}
        ]

        if logging or yielded:
            found += function.args.defaults
            found += [
                branch
                for node in nodes
                if isinstance(node, ast.IfExp)
                for branch in (node.body, node.orelse)
            ]

    texts = (n for n in found if isinstance(n, ast.Constant | ast.JoinedStr))
    return set(filter(is_sentence, map(join, texts)))


def test_all_records_are_listed() -> None:
    """Each text logged above DEBUG is on the page about log records, in all forms."""
    lines = find_blocks("errors.md")
    texts = [
        text
        for path in SOURCES
        if not path.as_posix().endswith(BARE)
        for text in find_logged(path)
    ]
    assert len(texts) > 30
    assert [
        text
        for text in texts
        if not any(re.search(to_pattern(text), line) for line in lines)
    ] == []


def test_attributes_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    """The attributes of records about tasks are on the page about monitoring."""
    page = ROOT.joinpath("docs", "monitoring.md").read_text("utf-8")
    listed = re.findall(r"^\| `(apitask_\w+)` \|", page, re.M)
    app = Flask(__name__)
    app.config.update(APITASK_TIMEOUT=0.01, APITASK_MAX_WORKERS=1)
    ApiTask(app)
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(PATIENCE)

    @app.get("/")
    def index() -> str:
        run(hold)
        assert begun.wait(PATIENCE)
        run(str)
        return ""

    assert app.test_client().get("/").status_code == 200
    go_on.set()
    found = {name for record in caplog.records for name in vars(record)}
    assert {name for name in found if name.startswith("apitask_")} == set(listed)
