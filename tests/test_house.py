"""How the code is put together: what may stand where, and who may import whom."""

from __future__ import annotations

import ast
import importlib.util
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
from torch import nn

import fxcollab
from fxcollab import errors

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "fxcollab").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def module_name(file: Path) -> str:
    package, *parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(({"cli": "fxcollab_cli"}.get(package, package), *parts)).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}

PRIVATE_MODULE = re.compile(r"torch(\.\w+)*\._\w+(\.\w+)*")
# Of every module, by convention; of named tuples; of Python's own library.
ALLOWED = {*vars(nn.Module()), "_replace", "_fields", "_getframe", "_exit", "_lru_cache_wrapper"}


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


def imports() -> nx.DiGraph:
    """Who imports whom, also inside functions and for types alone."""
    graph = nx.DiGraph()
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=names):
                    graph.add_edges_from((name, alias.name) for alias in names)
                case ast.ImportFrom(module=home, names=names, level=level):
                    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                    home = importlib.util.resolve_name(f"{'.' * level}{home or ''}", package)
                    parts = [f"{home}.{alias.name}" for alias in names]
                    graph.add_edges_from((name, part if part in MODULES else home) for part in parts)
    return graph


def test_the_library_imports_no_integration() -> None:
    edges = {(who, whom) for who, whom in imports().edges if "fxcollab.integrations." in f"{who} {whom}"}
    assert ("fxcollab.integrations.lightning", "lightning") in edges
    assert not [who for who, whom in edges if whom.startswith("fxcollab.integrations.")]


def test_no_file_imports_what_imports_it() -> None:
    circles = [sorted(names) for names in nx.strongly_connected_components(imports()) if len(names) > 1]
    assert not circles


def test_no_function_hides_a_module() -> None:
    """Of ``fxcollab.x``, where a function ``x`` was imported into the package, no one gets the file ``x.py``."""
    for name in MODULES:
        if name.startswith("fxcollab."):
            module = importlib.import_module(name)
            assert operator.attrgetter(name.removeprefix("fxcollab."))(fxcollab) is module


def test_every_error_has_a_hint() -> None:
    named = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    without = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in named
        if not any(keyword.arg == "hint" for keyword in node.keywords)
    ]
    assert not without
