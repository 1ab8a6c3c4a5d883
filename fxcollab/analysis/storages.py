"""Which nodes share storage with which values, and who writes into it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from fxcollab.analysis.effects import Observation


@dataclass(frozen=True)
class Write:
    """One in-place write.

    Attributes:
        node: the node that does it.
        roots: the tracked values whose storage it may hit.
        seen: those whose storage it was seen to hit; none where the node could not be run.
        assumed: those that it may hit for other inputs, and was not seen to.
    """

    node: fx.Node
    roots: frozenset[fx.Node]
    seen: frozenset[fx.Node]
    assumed: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Storages:
    """Which nodes share storage with the tracked values, and who writes into it.

    Attributes:
        roots: for every node that may share storage with tracked values, those values.
        writes: in-place writes into it, in the order of the graph.
    """

    roots: dict[fx.Node, frozenset[fx.Node]]
    writes: list[Write]

    def of(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The tracked values of which ``nodes`` may be aliases."""
        return frozenset().union(*(self.roots.get(node, frozenset()) for node in nodes))


def track_storages(
    graph: fx.Graph,
    observation: Observation,
    tracked: Iterable[fx.Node],
    *,
    certain: bool = False,
    checked: Collection[fx.Node] = (),
) -> Storages:
    """Follow the storage of ``tracked`` values through ``graph``; with ``certain`` only through certain effects.

    The nodes that are ``checked`` write into nothing but what they were seen to write into.
    """
    storages = Storages({node: frozenset({node}) for node in tracked}, [])
    for node in graph.nodes:
        effect = observation.of(node)
        if node.op == "output" or (certain and not effect.certain):
            continue
        written = storages.of(effect.writes)
        hit = written if certain or node in checked else written | storages.of(effect.asked)
        if hit:
            seen = written if effect.certain else frozenset[fx.Node]()
            storages.writes.append(Write(node, hit, seen, hit - written))
        if shared := storages.of(effect.shares if certain else effect.shares | effect.asked):
            storages.roots[node] = storages.of((node,)) | shared
    return storages


def with_aliases(graph: fx.Graph, observation: Observation, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes``, and the earlier values of which they are aliases."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node in found:
            found |= observation.of(node).shares | observation.of(node).asked
    return found


def nodes_behind(graph: fx.Graph, write: Write) -> Iterator[fx.Node]:
    """The nodes that run after a write."""
    return itertools.islice(itertools.dropwhile(lambda node: node is not write.node, graph.nodes), 1, None)
