"""Which nodes have to keep their order where branches run one after the other.

Branch by branch the trunk runs first, then each branch before those behind it. That moves a node before all deeper
ones which stand before it in the captured graph. Where both touch the same storage, or the same module's state, the
deeper one would see what is written after it:

    early = self.head(shared)   # level 1
    shared.add_(1)              # level 0: has to stay behind
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from torch import fx, nn

from fxcollab.analysis.effects import EffectAnalysis, track_storages, with_aliases
from fxcollab.module_state.holders import may_change

Pair = tuple[fx.Node, fx.Node]


def ordered_pairs(
    graph: fx.Graph, levels: Mapping[fx.Node, int], effects: EffectAnalysis, root: nn.Module
) -> tuple[Pair, ...]:
    """Pairs of nodes of different levels that have to stay in this order; none where no node follows a deeper one.

    Args:
        graph: a captured graph.
        levels: the level of every node.
        effects: what nodes do to their inputs.
        root: the module that targets refer to.
    """
    if not _goes_back(graph, levels):
        return ()
    return tuple(dict.fromkeys((*_by_storage(graph, levels, effects), *_by_module(graph, levels, root))))


def _goes_back(graph: fx.Graph, levels: Mapping[fx.Node, int]) -> bool:
    """Whether any operation stands behind a deeper one."""
    deepest = 0
    for node in graph.nodes:
        if node.op.startswith("call") and levels[node] < deepest:
            return True
        if node.op != "output":
            deepest = max(deepest, levels[node])
    return False


def _by_storage(graph: fx.Graph, levels: Mapping[fx.Node, int], effects: EffectAnalysis) -> Iterator[Pair]:
    crossing = {source for node in graph.nodes for source in node.all_input_nodes if levels[source] < levels[node]}
    storages = track_storages(graph, effects, with_aliases(graph, effects, crossing))
    position = {node: number for number, node in enumerate(graph.nodes)}
    for write in storages.writes:
        for node in graph.nodes:
            if node.op == "output" or levels[node] == levels[write.node]:
                continue
            if any(storages.roots.get(source, frozenset()) & write.roots for source in node.all_input_nodes):
                yield (node, write.node) if position[node] < position[write.node] else (write.node, node)


def _by_module(graph: fx.Graph, levels: Mapping[fx.Node, int], root: nn.Module) -> Iterator[Pair]:
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            for part in root.get_submodule(str(node.target)).modules():
                calls.setdefault(part, []).append(node)
    for module, nodes in calls.items():
        if any(levels[one] > levels[other] for one, other in pairwise(nodes)) and may_change(module):
            yield from ((one, other) for one, other in pairwise(nodes) if levels[one] != levels[other])
