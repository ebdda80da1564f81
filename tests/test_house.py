from __future__ import annotations

import ast
import pathlib

import pytest

TESTS = sorted(pathlib.Path(__file__).parent.glob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_every_test_says_what_it_guarantees(path: pathlib.Path) -> None:
    """A test has a docstring, so that its failure tells which guarantee is broken."""
    silent = [
        node.name
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []
