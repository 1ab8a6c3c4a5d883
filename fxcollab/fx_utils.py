"""Small tools over ``torch.fx`` graphs that several passes share."""

from __future__ import annotations

import gc
import json
import keyword
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import Argument, map_aggregate, map_arg

from fxcollab._torch import codegen_of


def copy_node(
    graph: fx.Graph, node: fx.Node, name: str, target: Any, argument: Callable[[fx.Node], Argument]
) -> fx.Node:
    """Append to ``graph`` a copy of ``node`` under another name and target, its inputs mapped."""
    args, kwargs = map_arg(node.args, argument), map_arg(node.kwargs, argument)
    new = graph.create_node(node.op, target, args, kwargs, name=name, type_expr=node.type)
    new.meta = dict(node.meta)
    return new


def map_inputs(value: Any, function: Callable[[fx.Node], Argument]) -> Any:
    """Nested arguments with every node replaced by ``function`` of it."""
    return map_arg(value, function)


def inputs_in(value: Any) -> list[fx.Node]:
    """The nodes in nested arguments."""
    found: list[fx.Node] = []
    map_arg(value, found.append)
    return found


def mutable(value: Any) -> Any:
    """Nested arguments with lists and dicts as generated code makes them, not fx's immutable ones."""
    if type(value) is tuple:
        return tuple(map(mutable, value))
    if isinstance(value, immutable_list):
        return list(map(mutable, value))
    if isinstance(value, immutable_dict):
        return {key: mutable(item) for key, item in value.items()}
    return value


def copy_graph(graph: fx.Graph, order: Iterable[fx.Node] | None = None) -> fx.Graph:
    """A copy of ``graph`` with the same node names; ``order`` may list its nodes in another order."""
    new = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes if order is None else order:
        values[node] = copy_node(new, node, node.name, node.target, values.__getitem__)
    new.set_codegen(codegen_of(graph))
    return new


def describe_node(node: fx.Node) -> tuple[str, str, Any, Any, Any, Any]:
    """Name, op, target, arguments (inputs by name), keyword arguments and type of a node."""
    args, kwargs = (map_aggregate(value, _comparable) for value in (node.args, node.kwargs))
    return node.name, node.op, getattr(node.target, "description", node.target), args, kwargs, node.type


def _comparable(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _InputName(value.name)
    return "nan" if value != value else value  # which equals nothing


class _InputName(str):
    """A node's name as an argument; differs from a string argument of the same text."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _InputName) and str.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(("input", str(self)))

    def __repr__(self) -> str:
        return f"%{self}"


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The nodes that a node depends on."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def first_difference(one: fx.Graph, other: fx.Graph, *, annotations: bool = True) -> str | None:
    """The first difference of two graphs, as text; None where they are equal node for node.

    Type annotations are compared unless ``annotations`` is False.
    """
    parts = slice(None if annotations else -1)
    for left, right in zip(one.nodes, other.nodes, strict=False):
        if describe_node(left)[parts] != describe_node(right)[parts]:
            return f"{left.format_node()!s} differs from {right.format_node()!s}"
    if len(one.nodes) != len(other.nodes):
        return f"{len(one.nodes)} nodes differ from {len(other.nodes)}"
    return None


def source_line(node: fx.Node) -> str | None:
    """The line of the user's code that made ``node``, where the tracer recorded it."""
    trace = node.meta.get("stack_trace") or node.stack_trace
    if not trace:
        return None
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip().startswith("File")]
    own = [line for line in lines if not line.startswith(f'File "{_TORCH}')]  # not the loop of an nn.Sequential
    return (own or lines)[-1] if lines else None


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def place(node: fx.Node) -> str:
    """Node, operation and source line, for messages."""
    line = source_line(node)
    return f"node {node.name!r} ({node.op} {node.target}){f', {line}' if line else ''}"


OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of attributes that all modules have."""

OWN = "_own"
"""Attribute of a `CollabGraphModule` under which the root's modules and tensors are, whatever their names."""


def opened_around(called: Iterable[str]) -> Iterator[str]:
    """The paths of the modules around those that are called, which themselves are not, nor lie in one that is."""
    kept = set(called)
    for name in kept:
        around = list(accumulate(name.split(".")[:-1], "{}.{}".format))
        if kept.isdisjoint(around):
            yield from around


def has_own(module: nn.Module) -> bool:
    """Whether it is a `CollabGraphModule`."""
    return isinstance(module, fx.GraphModule) and OWN in module.__dict__


def attribute(root: nn.Module, path: str) -> Any:
    """The module or tensor of ``root`` at a dotted path."""
    first, *names = path.split(".")
    own = root.__dict__[OWN] if has_own(root) else None
    value: Any = getattr(own if hasattr(own, first) else root, first)
    for name in names:
        value = getattr(value, name)
    return value


def make_printable(graph: fx.Graph, is_hidden: Callable[[str], bool]) -> None:
    """Replace targets that fx would print wrongly by equal ones that it prints correctly.

    A keyword is not an attribute that can be written out, and Python normalises names in code. A name that is not an
    identifier fx prints between double quotes without escaping it: a quote, a backslash or a line break would end the
    string. And where ``is_hidden``, the class of the module has something else under that name.
    """
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            names = str(node.target).split(".")
            own = is_hidden(names[0])
            as_written = normalize("NFKC", _escaped(node.target))
            if own or any(map(keyword.iskeyword, names)) or node.target != as_written:
                node.target = Target(node.target, own=own)


class Target(str):
    """The path of a module or a tensor, equal to the plain text; ``own`` if only `OWN` has the first name."""

    own: bool

    def __new__(cls, path: str, own: bool = False) -> Target:
        """A path."""
        new = super().__new__(cls, path)
        new.own = own
        return new

    def split(self, *args: Any) -> list[str]:
        """The names that lead from the module to the attribute, each of which escapes itself."""
        return [*([OWN] * self.own), *(_Name(name) for name in super().split(*args) if self)]


class _Name(str):
    def isidentifier(self) -> bool:
        return super().isidentifier() and not keyword.iskeyword(self) and normalize("NFKC", self) == self

    def __format__(self, specification: str) -> str:
        return _escaped(self)


def _escaped(text: Any) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def get_output(graph: fx.Graph) -> fx.Node:
    """The output node of ``graph``."""
    output: fx.Node = next(iter(reversed(graph.nodes)))
    return output


class Interpreter(fx.Interpreter):
    """Runs a module's graph node by node.

    Like generated code it passes lists and dicts that can be changed, and frees values that nothing uses.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph | None = None) -> None:
        super().__init__(model, graph=graph)
        for node in self.graph.nodes:
            if not node.users and node.op != "output":
                self.user_to_last_uses.setdefault(node, []).append(node)

    def fetch_attr(self, target: str) -> Any:
        """What a target names, whatever the module itself has under that name."""
        return attribute(self.module, str(target))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """The arguments of a node; fx's own are immutable."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(mutable, args)), {key: mutable(value) for key, value in kwargs.items()}


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection: a graph is thousands of objects that live on, in which it would look for cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def opened_module(node: fx.Node, called: str | None = None) -> str:
    """The innermost module whose forward was opened around ``node``; the called one's own path doesn't count.

    That is ``called``, which a node of a branch has another target for; by default the node's target.
    """
    stack = [str(path) for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
    own = called or str(node.target)
    inner = [path for path in stack if path and not (node.op == "call_module" and path == own)]
    return inner[-1] if inner else ""
