"""Graphs as plain data, for pickles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxcollab._torch import OpOverload, codegen_of
from fxcollab.provenance import META_KEY


@dataclass(frozen=True)
class _Input:
    """A node as an argument in a packed graph."""

    name: str


def pack(graph: fx.Graph) -> dict[str, Any]:
    """A graph as data."""
    nodes = [
        (
            node.op,
            node.name,
            _pack_target(node.target),
            map_aggregate(node.args, _pack_argument),
            map_aggregate(node.kwargs, _pack_argument),
            node.type,
            {key: node.meta[key] for key in (META_KEY, "stack_trace") if key in node.meta},
        )
        for node in graph.nodes
    ]
    return {"nodes": nodes, "codegen": codegen_of(graph)}


def _pack_argument(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _Input(value.name)
    return _pack_target(value) if isinstance(value, OpOverload) else value


@dataclass(frozen=True)
class _Operator:
    """An operator overload by name; torch's own can't be pickled."""

    name: str

    def resolve(self) -> Any:
        namespace, name = self.name.split("::")
        operator, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")


def _pack_target(target: Any) -> Any:
    if isinstance(target, OpOverload):
        return _Operator(target.name())  # type: ignore[no-untyped-call]
    return str(target) if isinstance(target, str) else target


def unpack(packed: dict[str, Any]) -> fx.Graph:
    """The graph that was packed."""
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}

    def argument(value: Any) -> Any:
        if isinstance(value, _Input):
            return values[value.name]
        return value.resolve() if isinstance(value, _Operator) else value

    for op, name, target, args, kwargs, type_expr, meta in packed["nodes"]:
        node = graph.create_node(
            op,
            argument(target),
            map_aggregate(args, argument),
            map_aggregate(kwargs, argument),
            name=name,
            type_expr=type_expr,
        )
        node.meta.update(meta)
        values[name] = node
    graph.set_codegen(packed["codegen"])
    return graph
