"""The part of a training model that some of its heads need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxcollab._torch import codegen_of
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.functional import shallow
from fxcollab.fx_utils import copy_node, get_output, map_inputs
from fxcollab.plan import Plan, plan_of
from fxcollab.provenance import provenance_of
from fxcollab.rewriting.outputs import codegen_for_heads, codegen_for_one, is_flat, output_of
from fxcollab.tree import Path, parse_branch_name


def keep_heads(train_model: CollabGraphModule, heads: Sequence[int], levels: Mapping[str, int]) -> CollabGraphModule:
    """A training model of some heads only, which shares modules and tensors with the whole one.

    Its forward returns the outputs of these heads, in order; gradients are scaled as in the whole. State of other
    branches is left out, the original's own included: ``levels`` are those of the original's state.
    """
    plan = plan_of(train_model)
    paths = [plan.tree.head_path(head) for head in heads]
    kept = {path[:level] for path in paths for level in range(len(path) + 1)}
    dropped = {name for name, level in levels.items() if (0,) * level not in kept}
    constants = {name: getattr(train_model, name) for name in train_model.constants}
    return CollabGraphModule(
        _without(train_model.root, dropped),
        train_model.modes.map(lambda graph: _subgraph(graph, plan, paths, kept)),
        constants=constants,
        peers={plan.options.peers: _kept_peers(train_model.get_submodule(plan.options.peers), kept)},
        recompute=train_model.recompute,
    )


def _subgraph(graph: fx.Graph, plan: Plan, paths: Sequence[Path], kept: Collection[Path]) -> fx.Graph:
    provenance = provenance_of(graph, plan.options.peers)
    new = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output" and provenance[node].branch in kept:
            values[node] = copy_node(new, node, node.name, node.target, values.__getitem__)
    outputs = [output_of(graph, plan.tree, path) for path in paths]
    whole: Any = type(get_output(graph).args[0])
    leaves = whole(leaf for head in outputs for leaf in head) if is_flat(codegen_of(graph)) else tuple(outputs)
    new.output(map_inputs(leaves, values.__getitem__)).meta = dict(get_output(graph).meta)
    new.set_codegen(codegen_for_heads(codegen_for_one(codegen_of(graph)), len(paths)))
    return new


def _without(module: nn.Module, dropped: Collection[str]) -> nn.Module:
    """A copy of ``module`` without some of its tensors, which shares all others."""
    if not dropped:
        return module
    new = shallow(module)
    for name in dropped:
        for registry in (new._parameters, new._buffers):
            registry.pop(name, None)
    for child, part in module._modules.items():
        below = {name.removeprefix(f"{child}.") for name in dropped if name.startswith(f"{child}.")}
        if below and part is not None:
            new._modules[child] = _without(part, below)
    return new


def _kept_peers(peers: nn.Module, kept: Collection[Path]) -> nn.Module:
    """The peers of the kept branches."""
    new = nn.Module()
    new.training = peers.training
    for name, child in peers.named_children():
        path = parse_branch_name(name)
        if path is None:
            new.add_module(name, _kept_peers(child, kept))
        elif path in kept:
            new.add_module(name, child)
    return new
