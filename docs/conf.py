from __future__ import annotations

import importlib.metadata
import os

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
myst_enable_extensions = ["colon_fence", "deflist"]
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
        r"(asyncio|celery|concurrent|flask|fnmatch|io|logging|math)\..*"
        r"|(opentelemetry|smtplib|sqlalchemy|threading|time)\..*",
    ),
    ("py:mod", "logging|smtplib"),
    # What only type checkers see, as it stands in a signature.
    (
        "py:class",
        r"cabc\..*|Flask|Sessions|P|P\.args|P\.kwargs|F|(flask_apitask\..*\.)?T|TaskFuture|Callback|.*\bT_co",
    ),
]

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["tables.css"]
# What is copied from a console is what was typed.
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
