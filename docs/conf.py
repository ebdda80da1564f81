from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import os
import typing as t

from docutils import nodes
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import make_refnode

import flask_apitask
from flask_apitask.config import Config

if t.TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "Flask-ApiTask"
author = "the flask-apitask contributors"
copyright = f"2026, {author}"
version = release = importlib.metadata.version("flask-apitask")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 60
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# The names of other projects are links where the documentation is published. A build
# elsewhere does not depend on their sites.
if "READTHEDOCS" in os.environ:
    extensions.append("sphinx.ext.intersphinx")

intersphinx_mapping = {
    "celery": ("https://docs.celeryq.dev/en/stable/", None),
    "flask": ("https://flask.palletsprojects.com/", None),
    "python": ("https://docs.python.org/3/", None),
    "sqlalchemy": ("https://docs.sqlalchemy.org/en/20/", None),
}

# A misspelled name of our own is an error; one of another project can't be looked up.
nitpicky = True
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(asyncio|celery|concurrent|contextlib|flask|fnmatch|io|logging|math)\..*"
        r"|(opentelemetry|smtplib|sqlalchemy|threading|time)\..*",
    ),
    ("py:mod", "logging|smtplib"),
    ("py:class", "Flask"),
]

html_theme = "furo"
html_title = f"{project} {version}"
html_logo = html_favicon = "static/logo.svg"
html_static_path = ["static"]
html_css_files = ["tables.css"]
# What is copied from a console is what was typed.
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

# Pages have plain `run()` and `APITASK_WAIT`, which read well on a code host, too. Here
# they become links to what describes them.
KEYS = {f"APITASK_{field.name.upper()}" for field in dataclasses.fields(Config)}


def show(name: str) -> str:
    """Return what pages call a public name."""
    return f"{name}()" if inspect.isfunction(getattr(flask_apitask, name)) else name


NAMES = {
    **{key: key for key in KEYS},
    **{show(name): f"flask_apitask.{name}" for name in flask_apitask.__all__},
    "@scoped": "flask_apitask.scoped",
    "@task": "flask_apitask.task",
    "ApiTask.init_app()": "flask_apitask.ApiTask.init_app",
    "TaskScope.submit()": "flask_apitask.TaskScope.submit",
    "record_tasks()": "flask_apitask.testing.record_tasks",
    "trace_tasks()": "flask_apitask.opentelemetry.trace_tasks",
}


class NameLinks(SphinxTransform):
    """Link the first mention of a name in each section."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        linked = set()

        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext()
            section = find_section(literal)

            if name in NAMES and section and (section, name) not in linked:
                linked.add((section, name))
                link = addnodes.pending_xref("", literal.deepcopy(), refwarn=True)
                link["refdomain"], link["reftype"] = "py", "obj"
                link["reftarget"], link["refdoc"] = NAMES[name], self.env.docname
                literal.replace_self(link)


def find_section(node: nodes.Node) -> nodes.section | None:
    """Return the section that a node is in, if it can be a link."""
    ends = nodes.section | nodes.title | nodes.reference | addnodes.pending_xref

    while not isinstance(node, ends | nodes.document):
        node = node.parent

    return node if isinstance(node, nodes.section) else None


def resolve_key(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Element
) -> nodes.reference | None:
    """Link a key to its heading on the page about the configuration."""
    key = node["reftarget"]

    if key not in KEYS:
        return None

    anchor = key.lower().replace("_", "-")
    return make_refnode(app.builder, node["refdoc"], "configuration", anchor, text)


# The API page has one signature for each function, and not those for type checkers.
for module in ("api", "on_commit", "on_success"):
    analyzer = ModuleAnalyzer.for_module(f"flask_apitask.{module}")
    analyzer.analyze()
    analyzer.overloads.clear()


def setup(app: Sphinx) -> None:
    app.add_transform(NameLinks)
    app.connect("missing-reference", resolve_key)
