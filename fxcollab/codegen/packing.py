"""Graphs as plain data, for pickles."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxcollab._torch import OpOverload, codegen_of
from fxcollab.provenance import META_KEY


class _Input(str):
    """The name of a node, as an argument in a packed graph."""


class _Operator(str):
    """The name of an operator overload; torch's own can't be pickled."""


def pack(graph: fx.Graph) -> dict[str, Any]:
    """A graph as data."""
    nodes = [
        (
            node.op,
            node.name,
            map_aggregate((node.target, node.args, node.kwargs), _packed),
            node.type,
            {key: node.meta[key] for key in (META_KEY, "stack_trace") if key in node.meta},
        )
        for node in graph.nodes
    ]
    return {"nodes": nodes, "codegen": codegen_of(graph)}


def _packed(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _Input(value.name)
    return _Operator(value.name()) if isinstance(value, OpOverload) else value  # type: ignore[no-untyped-call]


def unpack(packed: dict[str, Any]) -> fx.Graph:
    """The graph that was packed."""
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}

    def unpacked(value: Any) -> Any:
        if isinstance(value, _Operator):
            namespace, name, overload = (*value.replace("::", ".").split("."), "default")[:3]
            return getattr(getattr(getattr(torch.ops, namespace), name), overload)
        return values[value] if isinstance(value, _Input) else value

    for op, name, call, type_expr, meta in packed["nodes"]:
        target, args, kwargs = map_aggregate(call, unpacked)
        values[name] = graph.create_node(op, target, args, kwargs, name, type_expr)
        values[name].meta.update(meta)
    graph.set_codegen(packed["codegen"])
    return graph
