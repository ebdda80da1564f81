from __future__ import annotations

import ast
import io
import os
import pathlib
import re

import pytest

from flask_apitask.config import Config

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted([README, ROOT / "CHANGES.md", *DOCS.rglob("*.md")])
LINK = re.compile(r"(?<!`)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def find_anchors(page: pathlib.Path) -> set[str]:
    """Return the anchors of a page's headings, as a code host and Sphinx make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {f"#{heading.replace(' ', '-')}" for heading in plain}


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    """A link within the project is relative, to a file and a heading that are there."""
    for name, anchor in LINK.findall(page.read_text("utf-8")):
        target = page.parent / name if name else page
        assert target.is_file(), name

        if anchor:
            assert anchor in find_anchors(target), name + anchor


def test_hidden_code_is_hidden_everywhere() -> None:
    """A code host hides HTML comments, and shows the other kind of MyST's."""
    shown = [
        page.name for page in PAGES if re.search("^%", page.read_text("utf-8"), re.M)
    ]
    assert shown == []


def test_roles_are_not_visible() -> None:
    """A code host shows MyST's roles as they are, so no page but the API has any."""
    role = re.compile(r"\{[a-z:]+\}`[^`]|^:::", re.M)
    assert [page.name for page in PAGES if role.search(page.read_text("utf-8"))] == []


def test_included_files_are_linked() -> None:
    """A code host does not show what a page includes, so there is a link to it, too."""
    includes = [
        (text, name)
        for text in (page.read_text("utf-8") for page in PAGES)
        for name in re.findall(r"^```\{(?:literal)?include\} (\S+)", text, re.M)
    ]
    missing = [name for text, name in includes if f"]({name}):\n\n```{{" not in text]
    assert missing == ["../CHANGES.md"]  # which is all of its page


def test_named_tests_are_there() -> None:
    """Each file of tests that the security policy, or another page, names is there."""
    names = {
        name
        for page in PAGES
        if page.name != "tutorial.md"  # which has a test_app.py of its own
        for name in re.findall(r"\btest_\w+\.py\b", page.read_text("utf-8"))
    }
    assert len(names) > 5
    assert {
        name for name in names if not ROOT.joinpath("tests", name).is_file()
    } == set()


def test_readme_is_rendered_on_a_package_index() -> None:
    """The index's own renderer has nothing to say of it, and leaves no markup."""
    if os.environ.get("APITASK_REQUIRE_SERVICES") != "1":
        pytest.importorskip("comrak")
        pytest.importorskip("readme_renderer")

    from readme_renderer import markdown

    warnings = io.StringIO()
    page = markdown.render(README.read_text("utf-8"), stream=warnings)
    assert page is not None
    assert warnings.getvalue() == ""
    assert page.count("<table>") == README.read_text("utf-8").count("\n|---")
    assert 'src="docs/timeline.svg"' in page
    text = re.sub(r"<pre.*?</pre>|<code.*?</code>|<[^>]*>", "", page, flags=re.S)
    assert re.findall(r"\{\w+\}|[`|]|\]\(|\*\*|^[#%:]|invisible-code", text, re.M) == []


def test_readme_leads_to_every_page() -> None:
    """Each page of the documentation is reached from the README, or by one that is."""
    linked = {name for name, _ in LINK.findall(README.read_text("utf-8"))}
    pages = {path.relative_to(ROOT).as_posix() for path in DOCS.glob("*.md")}
    assert pages - linked == {"docs/changes.md", "docs/index.md"}


def test_all_keys_are_in_the_table() -> None:
    """Each key is explained, and in a table in order, with its default."""
    page = DOCS.joinpath("configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| `(APITASK_\w+)` \| `(.*?)` \|", page, re.M)
    keys = [f"APITASK_{k.upper()}" for k in vars(Config())]
    assert [key for key, _ in rows] == keys
    assert sorted(re.findall(r"^### `(\w+)`$", page, re.M)) == sorted(keys)
    table = {key: ast.literal_eval(default) for key, default in rows}
    assert Config.from_mapping(table) == Config()
