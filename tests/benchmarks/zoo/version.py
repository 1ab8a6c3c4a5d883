"""Which version of the passes a row was measured with."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import fxcollab

PASSES = ("analysis", "codegen", "proof", "rewriting", "runtime", "splits", "tracing")
"""Rooms of fxcollab that decide what becomes of a model, beside the files at its top that they use."""


@cache
def version() -> str:
    """A short hash of what the passes' source files do: comments and docstrings don't count."""
    root = Path(fxcollab.__file__).parent
    files = sorted([*root.glob("*.py"), *(file for room in PASSES for file in (root / room).rglob("*.py"))])
    return hashlib.sha256("\n".join(_statements(file) for file in files).encode()).hexdigest()[:12]


def _statements(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
