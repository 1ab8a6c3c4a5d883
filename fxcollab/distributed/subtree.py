"""The part of a training model that some of its heads need."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import fx, nn

from fxcollab._torch import codegen_of, pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.distributed.ranks import Ranks
from fxcollab.functional import without
from fxcollab.fx_utils import copy_node, get_output, map_inputs
from fxcollab.plan import Plan, plan_of
from fxcollab.provenance import META_KEY, Provenance, provenance_of
from fxcollab.rewriting.outputs import codegen_for_heads, codegen_for_one, is_flat, output_of
from fxcollab.rewriting.peers import kept_peers
from fxcollab.runtime.exchange import Exchange, register
from fxcollab.runtime.rescale import rescale
from fxcollab.tree import Path, branch_name

EXCHANGE = "exchange"
"""The module under the peers that has those through which ranks exchange gradients."""


def keep_heads(
    train_model: CollabGraphModule, ranks: Ranks, levels: Mapping[str, int], every: int
) -> CollabGraphModule:
    """A training model of the heads of one rank only, which shares modules and tensors with the whole one.

    Its forward returns the outputs of these heads, in order. State of other branches is left out, the original's own
    included: ``levels`` are those of the original's state. Values of a branch that other ranks have, too, reach
    deeper branches through an `Exchange`.
    """
    plan = plan_of(train_model)
    dropped = {name for name, level in levels.items() if (0,) * level not in ranks.groups}
    peers = kept_peers(train_model.get_submodule(plan.options.peers), ranks.groups)
    shared = {branch_name(path): group for path, group in ranks.groups.items() if group is not None}
    exchanges = nn.ModuleDict({name: Exchange(register(group), every) for name, group in shared.items()})
    peers.add_module(EXCHANGE, exchanges)
    return CollabGraphModule(
        without(train_model.root, dropped),
        train_model.modes.map(lambda graph: _Part(graph, plan, ranks).graph),
        constants={name: getattr(train_model, name) for name in train_model.constants},
        fixed=train_model.fixed,
        peers={plan.options.peers: peers},
        recompute=train_model.recompute,
    )


class _Part:
    """The part of a training graph that a rank's heads need.

    With the mean over heads in mind (equation 6), gradients at a value of a shared branch are the sum, over the ranks
    that have it, of what each one's readers send; a reader that several ranks have sends its share.
    """

    def __init__(self, graph: fx.Graph, plan: Plan, ranks: Ranks) -> None:
        self._plan, self._ranks = plan, ranks
        self._provenance = provenance_of(graph, plan.options.peers)
        self._paths = [plan.tree.head_path(head) for head in ranks.heads]
        self._kept = [node for node in graph.nodes if self._is_kept(node)]
        self._outputs = {path: output_of(graph, plan.tree, path) for path in self._paths}
        self._values: dict[fx.Node, fx.Node] = {}
        self._summed: dict[fx.Node, fx.Node] = {}
        self._crossing = self._crossing_values()
        self.graph = fx.Graph()
        for node in self._kept:
            if not self._is_scaling(node):
                self._copy(node, self._provenance[node].branch)
        self._write_output(graph)

    def _is_kept(self, node: fx.Node) -> bool:
        return node.op != "output" and self._provenance[node].branch in self._ranks.groups

    def _is_shared(self, node: fx.Node) -> bool:
        return self._ranks.groups[self._provenance[node].branch] is not None

    def _is_scaling(self, node: fx.Node) -> bool:
        """Whether it rescales a value of a shared branch: it is written where that value first crosses."""
        return self._provenance[node].kind == "rescale" and self._is_shared(node)

    def _crossing_values(self) -> dict[Path, list[fx.Node]]:
        """For each shared branch what deeper branches, and the outputs, read of it."""
        read: set[fx.Node] = set()
        for node in self._kept:
            own = self._provenance[node].branch
            crossing = [s for s in node.all_input_nodes if len(self._provenance[s].branch) < len(own)]
            read.update(node.all_input_nodes if self._is_scaling(node) else crossing)
        for output in self._outputs.values():
            read.update(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, fx.Node))
        found: dict[Path, list[fx.Node]] = {}
        for node in self._kept:
            if node in read and self._is_shared(node) and not self._is_scaling(node):
                found.setdefault(self._provenance[node].branch, []).append(node)
        return found

    def _copy(self, node: fx.Node, reader: Path) -> None:
        new = copy_node(self.graph, node, node.name, node.target, lambda source: self._read(source, reader))
        self._values[node] = new

    def _read(self, source: fx.Node, reader: Path) -> fx.Node:
        """What a node of branch ``reader`` reads for ``source``."""
        branch = self._provenance[source].branch
        if len(branch) >= len(reader) or not self._is_shared(source):
            return self._values[source]
        if source not in self._summed:
            self._exchange(branch)
        value, having = self._summed[source], len(self._ranks.holders(reader))
        if having == 1:
            return value
        share = Provenance("rescale", source.name, reader, rescale)
        return self._insert(f"{source.name}_share", share, rescale, (value, 1 / having))

    def _exchange(self, branch: Path) -> None:
        """Write the exchange of all that crosses from a branch, and the rescales of it."""
        ready = [node for node in self._crossing[branch] if node in self._values and node not in self._summed]
        own = Provenance("rescale", EXCHANGE, branch)
        target = f"{self._plan.options.peers}.{EXCHANGE}.{branch_name(branch)}"
        exchanged = self.graph.call_module(target, (tuple(self._values[node] for node in ready),))
        exchanged.meta[META_KEY] = own
        for place, node in enumerate(ready):
            self._summed[node] = self._insert(f"{node.name}_summed", own, operator.getitem, (exchanged, place))
        for node in self._kept:
            if self._is_scaling(node) and node not in self._summed and node.all_input_nodes[0] in ready:
                self._summed[node] = copy_node(self.graph, node, node.name, node.target, self._summed.__getitem__)

    def _insert(self, name: str, provenance: Provenance, function: Callable[..., Any], args: Any) -> fx.Node:
        node = self.graph.create_node("call_function", function, args, name=name)
        node.meta[META_KEY] = provenance
        return node

    def _write_output(self, whole: fx.Graph) -> None:
        outputs = [map_inputs(output, partial(self._read, reader=path)) for path, output in self._outputs.items()]
        kind: Any = type(get_output(whole).args[0])
        codegen = codegen_of(whole)
        leaves: Any = kind(leaf for head in outputs for leaf in head) if is_flat(codegen) else tuple(outputs)
        self.graph.output(leaves).meta = dict(get_output(whole).meta)
        self.graph.set_codegen(codegen_for_heads(codegen_for_one(codegen), len(outputs)))
