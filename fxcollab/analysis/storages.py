"""Which nodes share storage with which values, and who writes into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxcollab.analysis.effects import Observation


@dataclass(frozen=True)
class Write:
    """One in-place write: the node that does it, and the tracked values whose storage it hits."""

    node: fx.Node
    roots: frozenset[fx.Node]
    certain: bool


@dataclass(frozen=True)
class Storages:
    """Which nodes share storage with the tracked values, and who writes into it.

    Attributes:
        roots: for every node that may share storage with tracked values, those values.
        writes: in-place writes into it, in the order of the graph.
    """

    roots: dict[fx.Node, frozenset[fx.Node]]
    writes: tuple[Write, ...]


def track_storages(
    graph: fx.Graph, observation: Observation, tracked: Iterable[fx.Node], *, certain: bool = False
) -> Storages:
    """Follow the storage of ``tracked`` values through ``graph``; with ``certain`` only through certain effects."""
    roots = {node: frozenset({node}) for node in tracked}
    writes = []
    for node in graph.nodes:
        if not any(argument in roots for argument in node.all_input_nodes) or node.op == "output":
            continue
        effect = observation.of(node)
        if certain and not effect.certain:
            continue
        hit = _union(roots, effect.writes)
        if hit:
            writes.append(Write(node, hit, effect.certain))
        shared = _union(roots, effect.shares)
        if shared:
            roots[node] = roots.get(node, frozenset()) | shared
    return Storages(roots, tuple(writes))


def with_aliases(graph: fx.Graph, observation: Observation, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes``, and the earlier values of which they are aliases."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node in found:
            effect = observation.of(node)
            found |= effect.shares if effect.certain else frozenset()
    return found


def _union(roots: dict[fx.Node, frozenset[fx.Node]], nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
    return frozenset().union(*(roots.get(node, frozenset()) for node in nodes))
