"""Docstrings begin with a verb or a noun, and functions fit on a screen."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autotune"
FILES = sorted(PACKAGE.rglob("*.py"))
NEITHER = {
    *("What", "Whether", "Where", "Who", "Why", "When", "Which", "How"),
    *("Those", "That", "Not", "Nothing", "All", "If"),
}
MOST_LINES = 50


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_verb_or_a_noun_and_functions_are_short(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (ast.get_docstring(node) or "The").split()[0]
            assert first not in NEITHER, ast.get_docstring(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < MOST_LINES, node.name
