"""By which name each value of an opened model can be a split."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.splits.opening import Searched
from fxcollab.tracing.tracer import RETURNED_BY, call_name

SplitName = tuple[str, bool]
"""A name, and whether it is a module's."""


def value_names(captured: CollabGraphModule, searched: Searched) -> Mapping[fx.Node, SplitName]:
    """The name under which `transform` finds each value of ``captured``; values without one are left out.

    A module's value has the outermost module's name. Other nodes are named by the graph that `capture` makes for
    the split: all of them at granularity ``op`` or of a graph that is taken as it is, else those of the root's own
    forward. A name that is a module's path, too, means the module; values that one mode alone computes have none.
    """
    graph = captured.modes.train
    paths = {path for path, _ in searched.model.named_modules()}
    named = _of_operations(graph, searched)
    names = {node: (name, False) for node, name in named.items() if name not in paths}
    names |= {node: (name, True) for node, name in returned_by(graph).items()}
    if not captured.modes.differ:
        return names
    common = {node.name for node in captured.modes.eval.nodes} | set(returned_by(captured.modes.eval).values())
    return {node: name for node, name in names.items() if name[0] in common}


def _of_operations(graph: fx.Graph, searched: Searched) -> dict[fx.Node, str]:
    if searched.is_open:
        return {node: node.name for node in graph.nodes}
    own, shown = _of_the_root(graph), _of_the_root(searched.capture().modes.train)
    if [node.target for node in own] != [node.target for node in shown]:
        return {}
    return {node: other.name for node, other in zip(own, shown, strict=True)}


def returned_by(graph: fx.Graph) -> dict[fx.Node, str]:
    """The outermost module that returns each value; ``name@2`` is its second call."""
    calls: dict[str, int] = {}
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        returned = [str(call) for call in node.meta.get(RETURNED_BY, ())]
        if node.op == "call_module":
            path = str(node.target)
            calls[path] = calls.get(path, 0) + 1
            returned.append(call_name(path, calls[path]))
        if returned:
            names[node] = min(returned, key=lambda name: (name.count("."), len(name)))
    return names


def _of_the_root(graph: fx.Graph) -> list[fx.Node]:
    """What the root's own forward computes, other than by calling modules."""
    return [n for n in graph.nodes if n.op in ("call_function", "call_method") and not n.meta.get("nn_module_stack")]
