from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
import typing as t

import pytest

import flask_apitask

if t.TYPE_CHECKING:
    import collections.abc as cabc

PACKAGE = pathlib.Path(flask_apitask.__file__).parent

# From the bottom up. A module imports from the rows below its own, and no other.
LAYERS = (
    {"exceptions", "futures", "locks", "log", "signals", "uwsgi"},
    {"config", "mail.envelope", "mail.replies", "tasks", "threads"},
    {"jobs", "mail.rendering", "mail.smtp"},
    {"mail.pool", "scope"},
    {"context"},
    {"binding", "closing"},
    {"endings"},
    {"stack"},
    {"mail.changes"},
    {"mail.flask_mail"},
    {"mail"},
    {"extension"},
    {"__init__"},
)
LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}

# What else than the standard library a module may know.
LIBRARIES = {
    "signals": {"blinker"},
    "closing": {"flask"},
    "context": {"flask"},
    "binding": {"blinker", "flask"},
    "endings": {"flask"},
    "stack": {"flask"},
    "mail.changes": {"flask_mail", "typing_extensions"},
    "mail.flask_mail": {"flask", "flask_mail", "typing_extensions"},
    "mail.rendering": {"flask_mail"},
    "mail.pool": {"typing_extensions"},
    "extension": {"flask", "werkzeug"},
}

# Private names of other packages: which one is used, and why it may be.
FOREIGN_PRIVATE_NAMES = {
    "_Mail": "what app.extensions['mail'] is, in annotations only",
    "_MailMixin": "where Flask-Mail looks up all that it sends over, whatever stands in"
    " its place, by whomever (test_mail_flask_mail.py)",
    "_base": "where the standard library has its future's first state; TaskFuture sets"
    " that class's private attributes, too, to be made for less (test_futures.py)",
    "_cv_app": "the context variable behind Flask's proxies, which take two calls more"
    " to read it; each task and each request's end pays that (test_merged_context.py)",
    "_cv_request": "the same for the request, before Flask 3.2",
    "_cv_tokens": "Flask < 3.2: whether a request context is pushed, and, by a mark"
    " that goes with the push, whether that is torn down; a stream pushes it anew, and"
    " nothing public tells (test_request_scope.py, test_close.py)",
    "_current_frames": "documented by Python: what every thread is doing",
    "_get_current_object": "documented by Werkzeug: the object behind a proxy",
    "_register_atexit": "Python's own thread pool ends by it: atexit comes too late for"
    " what a task needs, and not at all in a child of multiprocessing; optional",
    "_request": "Flask >= 3.2: without it, the end of a task's context is not the end"
    " of the request; nothing public takes it away (test_merged_context.py)",
}

OPTIONAL = {"celery", "flask_debugtoolbar", "flask_mail"}


def find_modules() -> dict[str, ast.Module]:
    """Parse every module of the package, by its name below the package's."""
    modules = {}

    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts

        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]

        modules[".".join(parts)] = ast.parse(path.read_text("utf-8"))

    return modules


MODULES = find_modules()


def find_imports(name: str) -> cabc.Iterator[str]:
    """Yield the absolute name of all that a module imports, types included."""
    package = ["flask_apitask", *name.split(".")]

    if PACKAGE.joinpath(*package[1:]).is_dir():
        package.append("__init__")

    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)


def find_own_imports(name: str) -> set[str]:
    """Return the package's modules that a module imports from."""
    own = set()

    for imported in find_imports(name):
        package, _, rest = imported.partition(".")

        if package == "flask_apitask":
            # The last part is a module, or a name in one.
            own.add(rest if rest in MODULES else rest.rpartition(".")[0] or "__init__")

    return own


def find_own_names() -> set[str]:
    """Return the names that the package itself gives to functions and attributes."""
    own = set()

    for tree in MODULES.values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    own.add(node.name)
                case ast.Name(ctx=ast.Store()):
                    own.add(node.id)
                case ast.Attribute(ast.Name("self" | "cls"), attr, ast.Store()):
                    own.add(attr)

    return own


def find_private_names(tree: ast.Module) -> cabc.Iterator[str]:
    """Yield the private names that a module looks up in other objects and modules."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                yield name
            case ast.ImportFrom():
                yield from (alias.name for alias in node.names)
                yield from (node.module or "").split(".")
            case ast.Import():
                yield from ".".join(alias.name for alias in node.names).split(".")
            case ast.Call(
                ast.Name("getattr" | "hasattr" | "setattr" | "delattr"),
                [_, ast.Constant(str(name)), *_],
            ):
                yield name


def test_every_module_has_its_layer() -> None:
    """A new module is given its place, and no place is left to a module that went."""
    assert LEVELS.keys() == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name: str) -> None:
    """A module imports from the layers below its own, and from no other."""
    others = find_own_imports(name)
    assert {other for other in others if LEVELS[other] >= LEVELS[name]} == set()


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_where_they_belong(name: str) -> None:
    """Only the adapters know Flask and what comes with it, the cores none of it."""
    imported = {name.partition(".")[0] for name in find_imports(name)}
    libraries = imported - sys.stdlib_module_names - {"flask_apitask"}
    assert libraries == LIBRARIES.get(name, set())


def test_foreign_private_names_have_a_reason() -> None:
    """No private name of Flask, or of any other package, is used without a reason."""
    used = {name for tree in MODULES.values() for name in find_private_names(tree)}
    private = {name for name in used if name.startswith("_") and name[-2:] != "__"}
    foreign = {name for name in private if not name.startswith("_apitask")}
    assert foreign - find_own_names() == FOREIGN_PRIVATE_NAMES.keys()


def test_import_leaves_optional_packages_alone(tmp_path: pathlib.Path) -> None:
    """What an app did not ask for is not imported, even where it is installed."""
    code = f"import flask_apitask, sys; print({OPTIONAL} & sys.modules.keys())"
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        text=True,
        timeout=30,
    ).stdout
    assert printed == "set()\n"
