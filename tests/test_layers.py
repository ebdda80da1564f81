from __future__ import annotations

import ast
import fnmatch
import graphlib
import os
import pathlib
import subprocess
import sys
import typing as t

import pytest

import flask_apitask

if t.TYPE_CHECKING:
    import collections.abc as cabc

PACKAGE = pathlib.Path(flask_apitask.__file__).parent

# The cores: they import neither Flask nor anything else but the standard library.
CORES = ("executor.*", "mail.envelope", "mail.pool", "mail.smtp")

# What imports these modules, and nothing else does.
IMPORTERS = {
    "celery": {"extension"},
    "debugtoolbar": set(),
    "extension": {"__init__"},
    "mail": {"extension"},
    "opentelemetry": set(),
    "testing": set(),
    "waterfall": {"debugtoolbar"},
}

# Private names of other packages: which one is used, and why it may be.
FOREIGN_PRIVATE_NAMES = {
    "_cv_tokens": "Flask < 3.2: whether a request context is pushed; nothing public"
    " tells, once a stream has pushed it anew (test_request_scope.py)",
    "_Mail": "what app.extensions['mail'] is, in annotations only",
    "_MailMixin": "where Flask-Mail looks up all that it sends over, whatever stands in"
    " its place, by whomever (test_mail_flask_mail.py), and where Flask-Mailman finds"
    " its default backend, whichever was set up first (test_mail_mailman.py)",
    "_cached_data": "whether Werkzeug has kept a body; to ask for it would read it"
    " (test_bodies.py)",
    "_current_frames": "documented by Python: what every thread is doing",
    "_get_current_object": "documented by Werkzeug: the object behind a proxy",
    "_register_atexit": "Python's own thread pool ends by it: atexit comes too late for"
    " what a task needs, and not at all in a child of multiprocessing; optional",
    "_request": "Flask >= 3.2: without it, the end of a task's context is not the end"
    " of the request; nothing public takes it away (test_merged_context.py)",
}

OPTIONAL = {
    "asyncio",
    "celery",
    "flask_debugtoolbar",
    "flask_mail",
    "flask_mailman",
    "opentelemetry",
    "sqlalchemy",
}


def name_of(path: pathlib.Path) -> str:
    """Return the name of a module below the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)


MODULES = {
    name_of(path): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")
}


def walk(node: ast.AST, *, types: bool) -> cabc.Iterator[ast.AST]:
    """Yield all of a module, with or without what is there for type checkers only."""
    yield node

    for child in ast.iter_child_nodes(node):
        only_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(
            child.test
        )

        if types or not only_types:
            yield from walk(child, types=types)


def find_imports(name: str, *, types: bool = False) -> set[str]:
    """Return what a module imports: the package's modules, and other packages."""
    package = ["flask_apitask", *name.split(".")]

    if name == "__init__" or not (PACKAGE / pathlib.Path(*package[1:])).is_dir():
        package.pop()

    found: set[str] = set()

    for node in walk(MODULES[name], types=types):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found.update(".".join([*base, alias.name]) for alias in node.names)

    return {own_name(imported) for imported in found}


def own_name(imported: str) -> str:
    """Return the module that an import is from, or the package if it is another."""
    package, _, rest = imported.partition(".")

    if package != "flask_apitask":
        # Celery is not our module of the name.
        return f"{package}!" if package in MODULES else package

    # The last part is a module, or a name in one.
    return rest if rest in MODULES else rest.rpartition(".")[0] or "__init__"


def test_imports_run_downward() -> None:
    """No modules import each other, not even by way of others."""
    graph = {name: find_imports(name) & MODULES.keys() for name in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_cores_know_no_flask() -> None:
    """Scopes, threads and SMTP work without Flask; so does all that they import."""
    cores = {name for name in MODULES if any(fnmatch.fnmatch(name, c) for c in CORES)}
    assert len(cores) > 6
    libraries = set()
    left = set(cores)

    while left:
        imported = find_imports(left.pop())
        left |= (imported & MODULES.keys()) - cores
        cores |= imported & MODULES.keys()
        libraries |= imported - MODULES.keys() - sys.stdlib_module_names

    assert libraries == set()


def test_no_module_imports_those_above_it() -> None:
    """Only their users import the modules for set-up and for mail."""
    for name, importers in IMPORTERS.items():
        found = {other for other in MODULES if name in find_imports(other, types=True)}
        assert found == importers


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


def test_foreign_private_names_have_a_reason() -> None:
    """No private name of Flask, or of any other package, is used without a reason."""
    used = {name for tree in MODULES.values() for name in find_private_names(tree)}
    private = {name for name in used if name.startswith("_") and name[-2:] != "__"}
    assert private - find_own_names() == FOREIGN_PRIVATE_NAMES.keys()


def run_python(folder: pathlib.Path, *arguments: str) -> str:
    """Run Python with what can be imported here, and return what it has printed."""
    # An editable install may be found by a hook that not every Python has.
    path = [*sys.path, str(PACKAGE.parent)]
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        text=True,
        timeout=30,
    ).stdout


def test_import_leaves_optional_packages_alone(tmp_path: pathlib.Path) -> None:
    """What an app did not ask for is not imported, even where it is installed."""
    code = (
        "import flask, sys; before = set(sys.modules); import flask_apitask;"
        f" print({OPTIONAL} & (sys.modules.keys() - before))"
    )
    assert run_python(tmp_path, "-W", "error", "-c", code) == "set()\n"


@pytest.mark.parametrize("context", ["app_context", "test_request_context"])
def test_import_within_a_context(context: str, tmp_path: pathlib.Path) -> None:
    """App factories import in the middle of things."""
    code = (
        f"import flask; app = flask.Flask('shop')\nwith app.{context}():"
        " import flask_apitask.context; print(flask_apitask.context.find_app_context())"
    )
    assert "AppContext" in run_python(tmp_path, "-c", code)


def test_import_is_light(tmp_path: pathlib.Path) -> None:
    """Beyond what Flask brings, no module is imported but what futures are made of."""
    code = (
        "import concurrent.futures, flask, sys; before = set(sys.modules);"
        " import flask_apitask;"
        " new = sys.modules.keys() - before;"
        " print(*sorted(name for name in new if name.split('.')[0] != 'flask_apitask'))"
    )
    assert run_python(tmp_path, "-S", "-W", "error", "-c", code).split() == []
