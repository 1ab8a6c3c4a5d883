"""The statements of a generated forward, node by node, and functions made of some of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from torch import fx

_MARK = re.compile(r"# COUNTER: (\d+)\n")  # what torch.fx puts before the statement of each node

CALLS = ("call_module", "call_function", "call_method")


def by_node(body: Sequence[str]) -> list[str]:
    """What is generated for each node, with the mark before it."""
    whole = "".join(body)
    starts = [mark.start() for mark in _MARK.finditer(whole)]
    assert starts and not whole[: starts[0]].strip(), "torch.fx no longer marks the statements of nodes"
    return [whole[start:end] for start, end in zip(starts, [*starts[1:], len(whole)], strict=True)]


def function(name: str, parameters: Iterable[str], statements: str, returned: str) -> str:
    """The text of a function."""
    inner = f"{statements}return {returned}\n"
    return f"def {name}({', '.join(parameters)}):\n{textwrap.indent(inner, '    ')}"


def freed(names: Iterable[str]) -> str:
    """What lets go of values after a statement."""
    return "".join(f";  {name} = None" for name in names)


def names_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The names of nodes."""
    return tuple(node.name for node in nodes)


def fresh(name: str, taken: set[str]) -> str:
    """``name``, or the like of it where it is taken; it is afterwards."""
    while name in taken:
        name = f"{name}_"
    taken.add(name)
    return name


def one_or_tuple(names: Sequence[str]) -> str:
    """One value, or several as a tuple."""
    return names[0] if len(names) == 1 else parenthesised(names)


def parenthesised(items: Sequence[str]) -> str:
    """A tuple."""
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
