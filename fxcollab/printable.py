"""Names that generated code can hold, whatever characters are in them.

``torch.fx`` prints a name that is no identifier between double quotes, as it is: one with a quote, a backslash or a
line break in it gives code that is none.
"""

from __future__ import annotations

import json
from typing import Any

from torch import fx


def make_printable(graph: fx.Graph) -> None:
    """Give nodes whose target fx would print wrongly an equal one that it prints right."""
    for node in graph.nodes:
        path = node.target if node.op in ("call_module", "get_attr") else ""
        if path != _escaped(path):
            node.target = Target(path)


class Target(str):
    """The path of a module or a tensor; equal to the plain text."""

    def split(self, *args: Any) -> list[str]:
        """The names on the path, each printed as it must stand between double quotes."""
        return [_Name(name) for name in super().split(*args)]


class _Name(str):
    def __format__(self, specification: str) -> str:
        return _escaped(self)


def _escaped(text: Any) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
