"""How the code is put together: what may stand where, and who may import whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "fxcollab").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])

PRIVATE_MODULE = re.compile(r"torch(\.\w+)*\._\w+(\.\w+)*")
# Of every module, by convention; of named tuples; of Python's own library.
ALLOWED = {*vars(nn.Module()), "_replace", "_fields", "_getframe", "_lru_cache_wrapper"}


def private_names_of_torch(tree: ast.AST) -> Iterator[str]:
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_of_self(node)}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if PRIVATE_MODULE.fullmatch(alias.name))
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "torch":
                paths = (f"{module}.{alias.name}" for alias in names)
                yield from (path for path in paths if PRIVATE_MODULE.fullmatch(path))
            case ast.Constant(value=str(text)) if PRIVATE_MODULE.fullmatch(text):
                yield text
            case ast.Attribute(attr=name) if re.match("_[^_]", name) and name not in own | ALLOWED:
                yield ast.unparse(node)


def is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_private_names_of_torch_stand_in_one_file() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in FILES
        if file != ROOT / "fxcollab/_torch.py"
        for name in private_names_of_torch(ast.parse(file.read_text()))
    }
    assert not found
