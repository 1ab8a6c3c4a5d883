"""The level of every node: behind how many splits it lies.

A node that depends on inputs has the level of what it depends on. One that depends on no input, such as a parameter
or what is computed from parameters alone, has the least level of its users, so that a weight used behind a split
exists once per branch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree
from fxcollab.analysis.aliasing import (
    refuse_storage_that_crosses_twice,
    refuse_writes_that_copies_miss,
    writes_that_shallower_nodes_miss,
)
from fxcollab.analysis.effects import Observation
from fxcollab.analysis.storages import Storages, Write, nodes_behind, track_storages, with_aliases
from fxcollab.errors import SplitError
from fxcollab.functional import tensors_of
from fxcollab.fx_utils import attribute, get_output, place

Cuts = Sequence[tuple[fx.Node, ...]]


@dataclass(frozen=True, eq=False)
class GraphLevels:
    """Levels of one graph.

    Attributes:
        nodes: the level of every node.
        writes: in-place writes into the storage of values that cross into deeper levels.
        checked: calls of functions whose writes others would miss, if they wrote into these crossing values, as they
            were not seen to.
        floating: unused nodes that read state, whose level follows from that state.
    """

    nodes: Mapping[fx.Node, int]
    writes: tuple[Write, ...]
    checked: Mapping[fx.Node, frozenset[fx.Node]]
    floating: frozenset[fx.Node]


def dependence_levels(graph: fx.Graph, cuts: Cuts, names: Sequence[str], observation: Observation) -> GraphLevels:
    """Levels by data flow, where a later read of storage that was written depends on the write.

    ``cuts`` are the nodes of each split, in order, ``names`` the splits' names; independent instances have one cut at
    all inputs.

    Raises:
        SplitError: the splits are not ordered along the data flow, or don't reach the output.
    """
    written: dict[fx.Node, set[fx.Node]] = {}
    checked = set[fx.Node]()
    while True:
        levels, floating = _levels(graph, cuts, names, written, observation)
        crossing = {u for node in graph.nodes for u in node.all_input_nodes if levels[u] < levels[node]}
        tracked = with_aliases(graph, observation, crossing)
        storages = track_storages(graph, observation, tracked, checked=checked)
        deeper = [w for w in storages.writes if any(levels[root] < levels[w.node] for root in w.roots)]
        if _add_dependences(graph, levels, storages, deeper, written):
            continue
        seen = track_storages(graph, observation, tracked, certain=True)
        missed = {
            *refuse_storage_that_crosses_twice(graph, levels, (storages, seen), deeper, observation),
            *refuse_writes_that_copies_miss(graph, levels, storages, deeper),
            *writes_that_shallower_nodes_miss(graph, levels, storages, deeper),
        }
        if not missed:
            break
        checked |= missed
    writes = (*storages.writes, *_writes_to_aliases(graph, levels, storages, crossing))
    unwritten = {node: observation.of(node).asked - observation.of(node).writes for node in checked}
    crossing_ones = {
        node: frozenset(source for source in sources if storages.of({source})) for node, sources in unwritten.items()
    }
    return GraphLevels(levels, writes, crossing_ones, floating)


def _writes_to_aliases(
    graph: fx.Graph, levels: Mapping[fx.Node, int], storages: Storages, crossing: Collection[fx.Node]
) -> Iterator[Write]:
    """Writes into aliases of crossing values, which later readers of the values see."""
    seen: set[fx.Node] = set()
    writes = {write.node: write for write in storages.writes}
    for node in graph.nodes:
        if write := writes.get(node):
            hit = frozenset(v for v in seen if storages.roots[v] & write.roots and levels[node] <= levels[v])
            if hit - write.roots:
                yield Write(node, hit - write.roots, hit & write.seen)
        if node in crossing:
            seen.add(node)


def _levels(
    graph: fx.Graph,
    cuts: Cuts,
    names: Sequence[str],
    written: Mapping[fx.Node, set[fx.Node]],
    observation: Observation,
) -> tuple[dict[fx.Node, int], frozenset[fx.Node]]:
    behind = {node: 1 << k for k, cut in enumerate(cuts) for node in cut}
    masks: dict[fx.Node, int] = {}
    dependent: set[fx.Node] = set()
    stateful: set[fx.Node] = set()  # without inputs, reads state or draws random numbers; constants stay in the trunk
    for node in graph.nodes:
        sources = [*node.all_input_nodes, *written.get(node, ())]
        masks[node] = 0
        for source in sources:
            masks[node] |= masks[source] | behind.get(source, 0)
        reads = node.op in ("get_attr", "call_module") or observation.of(node).random
        if node.op in ("placeholder", "output") or not dependent.isdisjoint(sources):
            dependent.add(node)
        elif reads or not stateful.isdisjoint(node.all_input_nodes):
            stateful.add(node)
    _check_order(masks, cuts, names)
    levels = {node: masks[node].bit_length() for node in graph.nodes}
    levels[get_output(graph)] = len(cuts)
    floating = set()
    for node in reversed(graph.nodes):
        if node in stateful:
            users = [levels[user] for user in node.users if user not in floating]
            levels[node] = min(users, default=levels[node])
            if not users:
                floating.add(node)
    return levels, frozenset(floating)


def _check_order(masks: Mapping[fx.Node, int], cuts: Cuts, names: Sequence[str]) -> None:
    for k, cut in enumerate(cuts):
        for node in cut:
            inside = [j for j in range(len(cuts)) if masks[node] >> j & 1]
            if inside != list(range(k)):
                raise _out_of_order(k, inside, node, cuts, names, masks)
    for node, mask in masks.items():
        if node.op != "output" and mask & (mask + 1):
            last = names[mask.bit_length() - 1]
            raise SplitError(
                f"Splits {', '.join(names)} don't lie one behind the other.",
                where=place(node),
                why=f"{node.name!r} depends on {last!r}, but not on every split before it",
                hint="cut all values that cross at this point in one split: 'a+b'",
            )


def _out_of_order(
    k: int, inside: Sequence[int], node: fx.Node, cuts: Cuts, names: Sequence[str], masks: Mapping[fx.Node, int]
) -> SplitError:
    behind = ", ".join(repr(names[j]) for j in inside if j >= k)
    if behind == repr(names[k]):
        return SplitError(
            f"Split {names[k]!r} cuts at values that lie behind one another.",
            where=place(node),
            why=f"{node.name!r} depends on another value of the same split",
            hint="name them as two splits, or leave this one out",
        )
    if behind:
        places = sorted(range(len(cuts)), key=lambda j: max(masks[each].bit_count() for each in cuts[j]))
        return SplitError(
            f"Split {names[k]!r} lies behind {behind}, which is named after it.",
            where=place(node),
            why="splits are given in the order of the data flow",
            hint=f"name them in this order: {','.join(names[j] for j in places)}",
        )
    missing = next(names[j] for j in range(k) if j not in inside)
    if node in cuts[names.index(missing)]:
        return SplitError(
            f"Splits {missing!r} and {names[k]!r} are the same value.",
            where=place(node),
            why="a second split at the same value is only a larger fan-out",
            hint="leave one out",
        )
    return SplitError(
        f"Split {names[k]!r} doesn't lie behind split {missing!r}.",
        where=place(node),
        why=f"{node.name!r} doesn't depend on {missing!r}, so neither is deeper than the other",
        hint=f"if both belong to one cut, name it '{missing}+{names[k]}'",
    )


def check_reaches_output(graph: fx.Graph, cuts: Cuts, names: Sequence[str], observation: Observation) -> None:
    """Raise for a split whose value the output doesn't depend on.

    Raises:
        SplitError: with the nodes that do lie on the way.
    """
    needed = _needed(graph)
    if any(node not in needed for cut in cuts for node in cut):
        needed = _needed_through_writes(graph, observation)
    for cut, name in zip(cuts, names, strict=True):
        for node in cut:
            if node not in needed:
                way = [n.name for n in graph.nodes if n in needed and n.op == "call_module"]
                raise SplitError(
                    f"Split {name!r} is not on the path to the output.",
                    where=place(node),
                    why=f"nothing of the output is computed from {node.name!r}",
                    hint="on the path are " + ", ".join(way[-8:] or ["no modules"]),
                )


def _needed(graph: fx.Graph, also: Iterable[fx.Node] = ()) -> set[fx.Node]:
    needed = {get_output(graph), *also}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _needed_through_writes(graph: fx.Graph, observation: Observation) -> set[fx.Node]:
    """What the output depends on, including values that are written into storage which it reads."""
    storages = track_storages(graph, observation, graph.nodes)
    writes: set[fx.Node] = set()
    while True:
        needed = _needed(graph, writes)
        read = storages.of(needed)
        found = {write.node for write in storages.writes if write.seen & read}
        if found <= writes:
            return needed
        writes |= found


def _add_dependences(
    graph: fx.Graph,
    levels: Mapping[fx.Node, int],
    storages: Storages,
    writes: Iterable[Write],
    written: dict[fx.Node, set[fx.Node]],
) -> bool:
    """Make shallower readers that come after a write depend on it. Returns whether any was added."""
    before = sum(map(len, written.values()))
    for write in writes:
        for node in nodes_behind(graph, write) if write.seen else ():
            is_shallower = levels[node] < levels[write.node] and node.op != "output"
            if is_shallower and storages.of(node.all_input_nodes) & write.seen:
                written.setdefault(node, set()).add(write.node)
    return sum(map(len, written.values())) > before


def refuse_gradients_across_splits(levels: Mapping[fx.Node, int], splits: Sequence[str]) -> None:
    """Raise a SplitError where ``torch.autograd.grad`` differentiates by a value of another level than its own."""
    for node, level in levels.items():
        if node.target is not torch.autograd.grad:
            continue
        inputs = node.kwargs["inputs"] if "inputs" in node.kwargs else node.args[1]
        for value in pytree.tree_leaves(inputs):
            if isinstance(value, fx.Node) and levels[value] < level:
                split = splits[levels[value]] if splits else "the input"
                raise SplitError(
                    f"The forward differentiates through {f'split {split!r}' if splits else split}.",
                    where=f"{node.name}: torch.autograd.grad by {value.name}",
                    why="a split scales what comes back through it, also the gradients that the forward computes",
                    hint=f"use pattern 'multi-instance', or split before {value.name!r} or behind {node.name!r}"
                    if splits
                    else f"compute {value.name!r} in the forward: x = x.detach().requires_grad_()",
                )


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls, or that it hands to calls; None for other nodes."""
    value = attribute(root, str(node.target)) if node.op in ("call_module", "get_attr") else None
    return value if isinstance(value, nn.Module) else None


def state_tensors(node: fx.Node, root: nn.Module) -> dict[str, Tensor]:
    """The state that a node reads, by qualified name: of a parameter's node, or of a whole module."""
    module = module_of(node, root)
    if module is not None:
        return tensors_of(module, f"{node.target}.")
    value = attribute(root, str(node.target)) if node.op == "get_attr" else None
    return {str(node.target): value} if isinstance(value, Tensor) else {}
