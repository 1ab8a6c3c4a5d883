"""Partition: which level every node, module and tensor belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from fxcollab.analysis.effects import Observation
from fxcollab.analysis.foreign import (
    refuse_foreign_state,
    refuse_frozen_attributes,
    refuse_modules_on_both_sides,
    refuse_objects_with_state,
    refuse_state_written_by_modes,
    refuse_written_literals,
)
from fxcollab.analysis.levels import (
    Cuts,
    GraphLevels,
    check_reaches_output,
    dependence_levels,
    module_of,
    refuse_gradients_across_splits,
    state_tensors,
)
from fxcollab.analysis.observe import observe
from fxcollab.analysis.order import Pair, ordered_pairs
from fxcollab.analysis.split_names import find_cut, owners
from fxcollab.analysis.storages import Write
from fxcollab.arguments import checked
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import SplitError
from fxcollab.fingerprint import fingerprint
from fxcollab.functional import tensors_of
from fxcollab.tree import HeadTree

LEVEL_KEY = "fxcollab_level"
"""Key in the meta of captured nodes under which their level is found."""


@dataclass(frozen=True, eq=False)
class Partition:
    """A captured model, cut along a head tree.

    Attributes:
        tree: the head tree.
        nodes: for each graph, the level of every node.
        writes: for each graph, in-place writes into the storage of values that cross into deeper levels.
        checked: calls of functions that raise if they write into these inputs, as they were not seen to.
        ordered: for each graph, pairs of nodes of different levels that have to run in this order.
        modules: the level of each module that is called as one node: the least of its calls.
        state: the level of each parameter and buffer, under every name it has: the least of its uses.
        straddling: names of state that is written, and also used at deeper levels than its own.
        observation: what the nodes do.
        fingerprint: of the graphs as they were.
    """

    tree: HeadTree
    nodes: Mapping[fx.Graph, Mapping[fx.Node, int]]
    writes: Mapping[fx.Graph, tuple[Write, ...]]
    checked: Mapping[fx.Node, frozenset[fx.Node]]
    ordered: Mapping[fx.Graph, tuple[Pair, ...]]
    modules: Mapping[str, int]
    state: Mapping[str, int]
    straddling: frozenset[str]
    observation: Observation
    fingerprint: str

    def bytes_of_peers(self, captured: nn.Module) -> int:
        """What the peers' parameters and buffers will take in the machine's memory."""
        named = (*captured.named_parameters(), *captured.named_buffers())
        return sum(
            tensor.numel() * tensor.element_size() * (self.tree.branches(level) - 1)
            for name, tensor in named
            if tensor.device.type == "cpu" and (level := self.state.get(name, 0))
        )


@checked
def partition(captured: CollabGraphModule, tree: HeadTree, observation: Observation | None = None) -> Partition:
    """Cut ``captured`` at the splits of ``tree``.

    Args:
        captured: what `capture` returned.
        tree: the head tree; of a subclass only its heads' paths count.
        observation: that of an earlier partition of the same graphs; by default they are observed anew.

    Raises:
        SplitError: a split names nothing, lies off the path to the output, is out of order, or has no effect; or
            a module reaches state of another level that it doesn't register.
    """
    tree = HeadTree.from_heads(tree.splits, list(tree.paths(tree.depth)))
    observation = observe(captured) if observation is None else observation
    refuse_frozen_attributes(captured, observation)
    refuse_objects_with_state(captured)
    refuse_written_literals(observation)
    found = {graph: _cut_graph(graph, captured, tree, observation) for graph in captured.modes}
    _refuse_other_values(captured, tree.splits)
    uses = _Uses(captured, found)
    nodes = {graph: uses.settle(graph) for graph in found}
    result = Partition(
        tree,
        nodes,
        {graph: levels.writes for graph, levels in found.items()},
        {node: inputs for levels in found.values() for node, inputs in levels.checked.items()},
        {graph: ordered_pairs(graph, levels, observation, captured) for graph, levels in nodes.items()},
        uses.modules,
        uses.state_by_name(),
        uses.straddling(nodes.values(), observation),
        observation,
        fingerprint(captured.modes),
    )
    _refuse_split_without_effect(captured, result)
    refuse_modules_on_both_sides(captured, result.nodes.values(), result.state)
    refuse_state_written_by_modes(result.state, observation)
    refuse_foreign_state(captured.root, result.nodes.values(), result.state, observation)
    for levels in nodes.values():
        refuse_gradients_across_splits(levels, tree.splits)
        for node, level in levels.items():
            node.meta[LEVEL_KEY] = level
    return result


def _cut_graph(graph: fx.Graph, captured: CollabGraphModule, tree: HeadTree, observation: Observation) -> GraphLevels:
    if not tree.splits:
        return _independent(graph, observation)
    cuts: Cuts = [_find_cut(split, graph, captured) for split in tree.splits]
    check_reaches_output(graph, cuts, tree.splits, observation)
    return dependence_levels(graph, cuts, tree.splits, observation)


def _find_cut(split: str, graph: fx.Graph, captured: CollabGraphModule) -> tuple[fx.Node, ...]:
    modes = captured.modes
    try:
        return find_cut(split, graph, captured.root)
    except SplitError as error:
        if not modes.differ:
            raise
        try:
            find_cut(split, modes.eval if graph is modes.train else modes.train, captured.root)
        except SplitError:
            raise error from None
    here, there = ("eval", "train") if graph is modes.train else ("train", "eval")
    raise SplitError(
        f"Split {split!r} exists in {here} mode only.",
        why=f"in {there} mode the forward computes no such value",
        hint="split at a value that both modes compute",
    )


def _refuse_other_values(captured: CollabGraphModule, splits: Iterable[str]) -> None:
    """Raise for names of nodes that mean values of other modules in eval mode, as nodes are numbered."""
    for split in splits if captured.modes.differ else ():
        train, evaluation = (owners(split, graph, captured.root) for graph in captured.modes)
        if train != evaluation:
            here, there = (" and ".join(repr(owner or "the root") for owner in each) for each in (train, evaluation))
            raise SplitError(
                f"Split {split!r} is one value in train mode and another in eval mode.",
                why=f"in train mode {here} computes it, in eval mode {there}: each numbers its nodes",
                hint="split at what a module returns, or name a value by its module, as in 'layer.add'",
            )


def _independent(graph: fx.Graph, observation: Observation) -> GraphLevels:
    """Independent instances share the inputs and nothing else."""
    inputs = tuple(graph.find_nodes(op="placeholder"))
    levels = dependence_levels(graph, [inputs], ["inputs"], observation)
    nodes = {node: int(node.op != "placeholder") for node in graph.nodes}
    return GraphLevels(nodes, levels.writes, levels.checked, frozenset())


class _Uses:
    """Levels of state: the least of its uses in all graphs."""

    def __init__(self, captured: CollabGraphModule, found: Mapping[fx.Graph, GraphLevels]) -> None:
        self._captured, self._found = captured, found
        self._names = tensors_of(captured)
        self._paths: dict[nn.Module, list[str]] = {}
        for path, module in captured.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, []).append(path)
        self._levels: dict[int, int] = {}
        self._deepest: dict[int, int] = {}
        self.modules: dict[str, int] = {}
        for graph, levels in found.items():
            for node in graph.nodes:
                if node not in levels.floating:
                    self._use(node, levels.nodes[node])
        for levels in found.values():
            for node in levels.floating:
                self._use(node, self._level_of_owner(node))

    def settle(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """Node levels, those of state being the least of its uses, and those of unused nodes that of their state."""
        levels = self._found[graph]
        settled = dict(levels.nodes)
        for node in graph.nodes:
            if node.op == "get_attr":
                tensors = state_tensors(node, self._captured).values()
                settled[node] = min([self._levels[id(t)] for t in tensors], default=settled[node])
            elif node in levels.floating:
                own = [self._levels[id(t)] for t in state_tensors(node, self._captured).values()]
                settled[node] = max([*own, *(settled[u] for u in node.all_input_nodes)], default=0)
        return settled

    def state_by_name(self) -> dict[str, int]:
        """The level of every tensor under every name; what no node uses stays in the trunk."""
        return {name: self._levels.get(id(tensor), 0) for name, tensor in self._names.items()}

    def straddling(self, nodes: Iterable[Mapping[fx.Node, int]], observation: Observation) -> frozenset[str]:
        """Names of tensors that are written, and used at more than one level or at a deeper one than their own."""
        written = set[int]()
        for node, level in (pair for levels in nodes for pair in levels.items()):
            effects = observation.of(node)
            changes = [self._names[name] for name in effects.changes]
            for tensor in changes if effects.certain else state_tensors(node, self._captured).values():
                self._deepest[id(tensor)] = max(level, self._deepest.get(id(tensor), 0))
                written.add(id(tensor))
        return frozenset(
            name
            for name, t in self._names.items()
            if id(t) in written and self._levels.get(id(t)) != self._deepest[id(t)]
        )

    def _use(self, node: fx.Node, level: int) -> None:
        module = module_of(node, self._captured)
        if module is not None:
            for alias in self._paths[module]:
                self.modules[alias] = min(level, self.modules.get(alias, level))
        for tensor in state_tensors(node, self._captured).values():
            self._levels[id(tensor)] = min(level, self._levels.get(id(tensor), level))
            self._deepest[id(tensor)] = max(level, self._deepest.get(id(tensor), level))

    def _level_of_owner(self, node: fx.Node) -> int:
        """The level of other uses, or of the nearest other state: an unread counter lives with its module."""
        for name, tensor in state_tensors(node, self._captured).items():
            if id(tensor) in self._levels:
                return self._levels[id(tensor)]
            owner = name
            while owner:
                owner = owner.rpartition(".")[0]
                near = [
                    self._levels[id(neighbour)]
                    for other, neighbour in self._names.items()
                    if other.startswith(f"{owner}." if owner else "") and id(neighbour) in self._levels
                ]
                if near and owner:
                    return min(near)
        return 0


def _refuse_split_without_effect(captured: CollabGraphModule, found: Partition) -> None:
    tree = found.tree
    parameters = dict(captured.named_parameters(remove_duplicate=False))
    levels = {level for name, level in found.state.items() if name in parameters}
    for level in sorted({*range(1, tree.depth + 1)} - levels):
        deeper = tree.splits[level] if level < len(tree.splits) else "the output"
        shared = sorted(_used_at(level, captured, found) & parameters.keys())
        what, where = "Several instances have no effect.", "the inputs"
        if tree.splits:
            what, where = f"Split {tree.splits[level - 1]!r} has no effect.", "it"
        why = f"no parameter lies between {where} and {deeper}, so its branches would all compute the same"
        if not tree.splits or not parameters:
            hint = "give a model whose output depends on parameters"
        elif shared:
            why = "what lies behind it has parameters that are used before it too, and so are shared by all heads"
            hint = "give each use parameters of its own, or use multi-instance, where every head has all of them"
        elif level == len(tree.splits):
            hint = "move the split towards the input"
        else:
            hint = f"leave it out and give {deeper!r} a larger fan-out"
        raise SplitError(what, where=", ".join(shared[:4]) or None, why=why, hint=hint)


def _used_at(level: int, captured: CollabGraphModule, found: Partition) -> set[str]:
    """Names of the state that nodes of a level read."""
    return {
        name
        for levels in found.nodes.values()
        for node, own in levels.items()
        if level in ([levels[user] for user in node.users] if node.op == "get_attr" else [own])
        for name in state_tensors(node, captured)
    }
