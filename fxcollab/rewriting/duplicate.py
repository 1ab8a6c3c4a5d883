"""Duplicate what lies behind the splits, once a branch, and rescale what crosses.

Nodes are in the order of branches, depth first: the trunk, then each branch, followed by those behind it:

    layer2 = self.layer2(layer1)
    rescale = fxcollab_rescale(layer2, 0.5)
    layer3 = self.layer3(rescale)
    fc = self.fc(layer3)
    layer3_b1 = self.peers.b1.layer3(rescale)
    fc_b1 = self.peers.b1.fc(layer3_b1)
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import fx, nn

from fxcollab._torch import codegen_of
from fxcollab.analysis.partition import Partition
from fxcollab.analysis.storages import Write
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.functional import parameter_names
from fxcollab.fx_utils import attribute, copy_graph, copy_node, inputs_in, map_inputs
from fxcollab.plan import RewriteOptions
from fxcollab.provenance import META_KEY, Kind, Provenance
from fxcollab.rewriting.outputs import codegen_for_heads, is_flat
from fxcollab.runtime.operators import ReadsOnly
from fxcollab.runtime.private_copy import private_copy
from fxcollab.runtime.rescale import rescale
from fxcollab.tree import Path, branch_name


def duplicate(
    graph: fx.Graph, captured: CollabGraphModule, partition: Partition, options: RewriteOptions
) -> tuple[fx.Graph, Mapping[str, str]]:
    """The training graph of one captured graph, which is not changed.

    Also, for the target of each call with shallower parameters, that of the module itself.
    """
    return _Writer(graph, captured, partition, options).write()


class _Writer:
    def __init__(
        self, graph: fx.Graph, captured: CollabGraphModule, partition: Partition, options: RewriteOptions
    ) -> None:
        self._captured, self._root, self._partition, self._options = graph, captured, partition, options
        self._tree, self._levels = partition.tree, partition.nodes[graph]
        self._graph = fx.Graph()
        self._taken = {node.name for node in graph.nodes}
        self._instances: dict[tuple[fx.Node, Path], fx.Node] = {}
        self._inserted: dict[tuple[Any, ...], fx.Node] = {}
        self._names: dict[tuple[Kind, fx.Node, int, int, int], str] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        self._before: list[tuple[fx.Node, fx.Node]] = []
        self._copied = _copy_levels(self._levels, partition.writes[graph])
        self._functional: dict[str, str] = {}
        self._position = 0

    def write(self) -> tuple[fx.Graph, Mapping[str, str]]:
        for position, node in enumerate(self._captured.nodes):
            self._position = position
            if node.op == "output":
                self._write_output(node)
            else:
                for path in self._tree.paths(self._levels[node]):
                    self._write_instance(node, path)
                self._note_writes(node)
        for one, other in self._partition.ordered[self._captured]:
            self._keep_order(self._instances_of(one), self._instances_of(other))
        return copy_graph(self._graph, branch_order(self._graph.nodes, self._before)), self._functional

    def _instances_of(self, node: fx.Node) -> Iterator[fx.Node]:
        return (self._instances[node, path] for path in self._tree.paths(self._levels[node]))

    def _keep_order(self, early: Iterable[fx.Node], late: Iterable[fx.Node]) -> None:
        """Run ``early`` before ``late`` where one branch lies behind the other; siblings don't see each other."""
        for one, other in itertools.product(early, late):
            if all(map(operator.eq, _branch_of(one), _branch_of(other))):
                self._before.append((one, other))

    def _note_writes(self, node: fx.Node) -> None:
        """What is read after a write in place gets a new rescale: autograd forbids the view made before.

        A branch that writes into a shallower value has a private copy.
        """
        for write in self._partition.writes[self._captured]:
            if write.node is node:
                for root in write.roots:
                    if root.op == "get_attr" or self._levels[node] <= self._levels[root]:
                        self._writes.setdefault(root, []).extend(self._instances_of(node))

    def _write_instance(self, node: fx.Node, path: Path) -> None:
        name = node.name if not any(path) else self._fresh(f"{node.name}_{branch_name(path)}")
        target = self._target(node, path)
        shallow = self._shallow_parameters(node, path)
        state = {key: self._parameter(node, key, path) for key in shallow}
        new = copy_node(self._graph, node, name, target, lambda source: self._value(source, path))
        if state:
            new.args = (state, *new.args)
            new.target = f"{self._options.peers}.functional_call.{branch_name(path)}.{node.target}"
            self._functional[new.target] = target
        kind: Kind = "clone" if path else "shared"
        new.meta[META_KEY] = Provenance(kind, node.name, path, node.target, self._position, functional=bool(state))
        self._instances[node, path] = new

    def _write_output(self, node: fx.Node) -> None:
        paths = self._tree.paths(self._tree.depth)
        heads = [map_inputs(node.args[0], partial(self._value, path=path)) for path in paths]
        codegen = codegen_of(self._captured)
        leaves: Any = type(node.args[0])  # a tuple or a list; pruning gives back the same
        new = self._graph.output(
            leaves(leaf for head in heads for leaf in head) if is_flat(codegen) else tuple(heads)
        )
        new.meta = {**node.meta, META_KEY: Provenance("output", node.name, (), node.type, self._position)}
        self._graph.set_codegen(codegen_for_heads(codegen, self._tree.heads))

    def _value(self, source: fx.Node, path: Path) -> fx.Node:
        """What an instance of branch ``path`` reads where the original reads ``source``."""
        value = self._instances[source, path[: self._levels[source]]]
        for home in self._copied.get(source, ()):
            if home <= len(path):
                value = self._private(source, value, path[:home])
        return self._rescaled(source, value, path)

    def _rescaled(self, source: fx.Node, value: fx.Node, path: Path) -> fx.Node:
        """``value``, an instance of ``source``, as branch ``path`` reads it."""
        same = len(path) == len(_branch_of(value))
        if not self._options.rescale or same or not self._may_carry_gradient(source):
            return value
        return self._insert_rescale(source, value, path)

    def _may_carry_gradient(self, node: fx.Node) -> bool:
        """Whether a node's value can be a tensor with a gradient."""
        if node.op == "get_attr":
            return isinstance(attribute(self._root, str(node.target)), nn.Parameter)
        return not self._partition.observation.of(node).plain

    def _private(self, source: fx.Node, value: fx.Node, path: Path) -> fx.Node:
        """The private copy of ``value`` that branch ``path`` has."""
        key: Any = (source, path)
        if key not in self._instances:
            value = self._rescaled(source, value, path)
            self._instances[key] = self._new("copy", source, path, path, private_copy, (value,))
        return self._instances[key]

    def _insert_rescale(self, source: fx.Node, value: fx.Node, path: Path) -> fx.Node:
        """The rescale of ``value``, which all branches of a level with the same factor share; itself for factor 1."""
        branch = _branch_of(value)
        factor = self._tree.factor(branch, path)
        if factor == 1:
            return value
        key = ("rescale", value, len(path), factor, len(self._writes.get(source, ())))
        if key not in self._inserted:
            self._inserted[key] = self._new("rescale", source, branch, path, rescale, (value, factor))
        return self._inserted[key]

    def _new(self, kind: Kind, source: fx.Node, branch: Path, reader: Path, function: Any, args: Any) -> fx.Node:
        """Insert a node, named after head 0's at the same place."""
        writes = self._writes.get(source, [])
        key = (kind, source, len(branch), len(reader), len(writes))
        if key not in self._names:
            self._names[key] = name = self._fresh(kind)
        else:
            name = self._fresh(f"{self._names[key]}_{branch_name(branch if any(branch) else reader)}")
        node = self._graph.create_node("call_function", function, args, name=name)
        node.meta[META_KEY] = Provenance(kind, source.name, branch, function, self._position)
        self._keep_order(writes, [node])
        return node

    def _shallow_parameters(self, node: fx.Node, path: Path) -> list[str]:
        """Parameters of a called module that belong to a shallower level and so cross into this call."""
        if node.op != "call_module" or not path:
            return []
        module = self._root.get_submodule(str(node.target))
        names = parameter_names(module)  # tied ones once: the call replaces all
        return [name for name in names if self._partition.state[f"{node.target}.{name}"] < len(path)]

    def _parameter(self, node: fx.Node, name: str, path: Path) -> fx.Node:
        full = f"{node.target}.{name}"
        level = self._partition.state[full]
        target = self._instance_name(full, path[:level])
        inserted: Any = ("state", target, level)
        if inserted not in self._inserted:
            get = self._graph.create_node("get_attr", target, name=self._fresh(full.replace(".", "_")))
            get.meta[META_KEY] = Provenance("state", node.name, path[:level], full, self._position)
            self._inserted[inserted] = get
        value = self._inserted[inserted]
        return self._insert_rescale(node, value, path) if self._options.rescale else value

    def _target(self, node: fx.Node, path: Path) -> Any:
        if node in self._partition.checked:
            given: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
            read = self._partition.checked[node]
            return ReadsOnly(node.target, tuple(key for key, value in given if not read.isdisjoint(inputs_in(value))))
        name = str(node.target)
        if node.op in ("call_module", "get_attr") and name in self._partition.modules:
            return self._instance_name(name, path[: self._partition.modules[name]])
        if node.op == "get_attr" and name in self._partition.state:
            return self._instance_name(name, path)
        return node.target

    def _instance_name(self, name: str, path: Path) -> str:
        return f"{self._options.peers}.{branch_name(path)}.{name}" if any(path) else name

    def _fresh(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate


def branch_order(nodes: Iterable[fx.Node], before: Iterable[tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
    """Nodes of a training graph branch by branch, depth first, as far as the data flow and ``before`` allow.

    ``before`` are pairs whose first node has to run before the second, as they do in ``nodes``. Inside a branch nodes
    keep their order; as long as a branch can go on, it does.
    """
    waits = {node: set(node.all_input_nodes) for node in nodes}
    for early, late in before:
        waits[late].add(early)
    *others, output = waits
    found = dict.fromkeys(node for node in others if node.op == "placeholder")
    queues: dict[Path, deque[fx.Node]] = {}
    for node in others:
        if node not in found:
            queues.setdefault(_branch_of(node), deque()).append(node)
    queues = dict(sorted(queues.items()))
    while queues:
        branch = next(path for path, queue in queues.items() if waits[queue[0]] <= found.keys())
        queue = queues[branch]
        while queue and waits[queue[0]] <= found.keys():
            found[queue.popleft()] = None
        if not queue:
            del queues[branch]
    return [*found, output]


def _copy_levels(levels: Mapping[fx.Node, int], writes: Iterable[Write]) -> dict[fx.Node, list[int]]:
    """For each crossing value, the levels whose branches write into its storage and need private copies."""
    found: dict[fx.Node, set[int]] = {}
    for write in writes:
        for root in write.roots:
            if root.op != "get_attr" and levels[root] < levels[write.node]:
                found.setdefault(root, set()).add(levels[write.node])
    return {node: sorted(homes) for node, homes in found.items()}


def _branch_of(node: fx.Node) -> Path:
    found = node.meta[META_KEY]
    assert isinstance(found, Provenance)
    return found.branch
