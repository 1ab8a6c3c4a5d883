"""Which nodes keep their captured order where the code runs branch by branch.

The trunk runs first, then each branch before those behind it. That moves a node before all deeper ones which stand
before it in the captured graph. Where one of them writes what both use, they must not change places:

    early = self.head(shared)   # level 1
    shared.add_(1)              # level 0: has to run after it
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from torch import fx, nn

from fxcollab.analysis.effects import Observation
from fxcollab.analysis.storages import track_storages, with_aliases
from fxcollab.fx_utils import attribute

Levels = Mapping[fx.Node, int]
Pair = tuple[fx.Node, fx.Node]


def ordered_pairs(graph: fx.Graph, levels: Levels, observation: Observation, root: nn.Module) -> tuple[Pair, ...]:
    """Pairs of nodes of different levels that have to run in this order; none where no node follows a deeper one."""
    if not _goes_back(graph, levels):
        return ()
    pairs: dict[Pair, None] = {}
    for used, uses in _uses(graph, levels, observation, root).items():
        if not any(writes for _, writes in uses):
            continue
        for (one, one_writes), (other, other_writes) in combinations(uses, 2):
            # A branch writes into a private copy of a shallower value, which only nodes behind it see.
            shallow_writes = one_writes if levels[one] < levels[other] else other_writes
            writes = shallow_writes if isinstance(used, fx.Node) else one_writes or other_writes
            if writes and levels[one] != levels[other]:
                pairs[one, other] = None
    return tuple(pairs)


def _goes_back(graph: fx.Graph, levels: Levels) -> bool:
    """Whether any operation stands behind a deeper one."""
    deepest = 0
    for node in graph.nodes:
        if node.op.startswith("call") and levels[node] < deepest:
            return True
        if node.op != "output":
            deepest = max(deepest, levels[node])
    return False


def _uses(
    graph: fx.Graph, levels: Levels, observation: Observation, root: nn.Module
) -> dict[Any, list[tuple[fx.Node, bool]]]:
    """For each crossing value, module and tensor of state: the nodes that use it, and whether they write it.

    Keys are nodes, modules, and the ids of tensors, which may have several names.
    """
    state = {node: id(attribute(root, str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    crossing = {source for node in graph.nodes for source in node.all_input_nodes if levels[source] < levels[node]}
    storages = track_storages(graph, observation, with_aliases(graph, observation, crossing | state.keys()))
    writes = {write.node: write.roots for write in storages.writes}
    found: dict[Any, list[tuple[fx.Node, bool]]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        read = storages.of(node.all_input_nodes)
        written = {state.get(value, value) for value in writes.get(node, ())}
        used: dict[Any, bool] = {key: key in written for key in (state.get(value, value) for value in read)}
        if node.op == "call_module":
            for part in root.get_submodule(str(node.target)).modules():
                own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
                used |= {part: True} | {id(tensor): True for tensor in own}  # a call may change what a module holds
        for key, is_written in used.items():
            found.setdefault(key, []).append((node, is_written))
    return found
