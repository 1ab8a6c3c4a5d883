"""What a transform did, in numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcollab.analysis.partition import partition
from fxcollab.codegen.branches import Recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.costs import Costs, costs_of, parameter_count
from fxcollab.costs.original import ProfiledOriginal, profile_original
from fxcollab.costs.step import Placement
from fxcollab.functional import tensors_of
from fxcollab.plan import Plan, plan_of
from fxcollab.provenance import provenance
from fxcollab.tracing.capture import LIMITATIONS_KEY


@dataclass(frozen=True)
class Level:
    """One level of the head tree.

    Attributes:
        level: 0 for the trunk.
        split: the split before it, None for the trunk.
        branches: how many instances there are.
        nodes: names of the captured graph's nodes at this level.
        parameters: values in the parameters of one branch.
    """

    level: int
    split: str | None
    branches: int
    nodes: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Summary:
    """A training graph against its original.

    Attributes:
        pattern, heads, seed, init: as planned.
        chosen: why the splits were chosen; None where they were named.
        levels: the trunk and every level below it.
        shared, cloned, rescaled, copied: numbers of nodes: once for all heads; added for peers; inserted
            rescales; inserted copies that guard against in-place writes.
        parameters: of the original and of the training model.
        costs: of a training step with SGD and momentum, or None where they can't be counted.
        inputs: the inputs that were counted on, as text, or None.
        guessed: whether these are a usual shape that fits, as nobody gave any.
        costs_unknown: why costs can't be counted, or None.
        limitations: limitations.
        recompute: what is computed again in the backward pass; None for nothing.
    """

    pattern: str
    heads: int
    seed: int
    init: str
    chosen: str | None
    levels: tuple[Level, ...]
    shared: int
    cloned: int
    rescaled: int
    copied: int
    parameters: tuple[int, int]
    costs: Costs | None
    inputs: str | None
    guessed: bool
    costs_unknown: str | None
    limitations: tuple[str, ...]
    recompute: Recompute | None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return dataclasses.asdict(self) | {"costs": self.costs and self.costs.to_json()}


def summarise(train_model: CollabGraphModule, counted: ProfiledOriginal | None = None) -> Summary:
    """Count what is in a training model; costs at the inputs of its plan, or at a usual shape that fits.

    Args:
        train_model: what `transform` or `load` returned.
        counted: what `count` found of it, where that was asked before.

    Raises:
        StateError: it is no training model.
    """
    plan = plan_of(train_model)
    graph = train_model.modes.train
    kinds = [provenance(node).kind for node in graph.nodes]
    clones = [node for node in graph.nodes if provenance(node).kind == "clone"]
    counted = counted or profile_original(train_model)
    return Summary(
        pattern=plan.pattern,
        heads=plan.tree.heads,
        seed=plan.seed,
        init=plan.init,
        chosen=plan.chosen,
        levels=tuple(_level(train_model, graph, level) for level in range(plan.tree.depth + 1)),
        shared=kinds.count("shared"),
        cloned=sum(any(provenance(node).branch) for node in clones),
        rescaled=kinds.count("rescale"),
        copied=kinds.count("copy"),
        parameters=(parameter_count(train_model.root), parameter_count(train_model)),
        costs=_costs(counted, plan),
        inputs=counted.inputs,
        guessed=counted.guessed,
        costs_unknown=counted.unknown,
        limitations=tuple(train_model.meta.get(LIMITATIONS_KEY, ())),
        recompute=plan.recompute,
    )


def _level(train_model: CollabGraphModule, graph: fx.Graph, level: int) -> Level:
    plan = plan_of(train_model)
    first = (0,) * level
    nodes = [provenance(node) for node in graph.nodes]
    names = tuple(p.origin for p in nodes if p.kind in ("shared", "clone") and p.branch == first)
    return Level(
        level,
        plan.tree.splits[level - 1] if level and plan.tree.splits else None,
        math.prod(plan.tree.fanouts[:level]),
        names,
        _parameters(train_model, level),
    )


def _parameters(train_model: CollabGraphModule, level: int) -> int:
    """Parameters of one branch, told by what the peers of its first sibling own; the trunk has the rest."""
    plan = plan_of(train_model)
    original = dict(train_model.root.named_parameters())
    owned: dict[int, int] = {}
    shared = {id(tensor) for tensor in original.values()}
    for depth in range(1, plan.tree.depth + 1):
        path = (*(0,) * (depth - 1), 1)
        branch = train_model.get_submodule(f"{plan.peers}.b{'_'.join(map(str, path))}")
        own = {id(t): t.numel() for n, t in tensors_of(branch).items() if n in original and id(t) not in shared}
        owned[depth] = sum(own.values())
    return owned[level] if level else parameter_count(train_model.root) - sum(owned.values())


def _costs(counted: ProfiledOriginal, plan: Plan) -> Costs | None:
    if counted.profile is None:
        return None
    placement = Placement.of(counted.captured, partition(counted.captured, plan.tree), plan.recompute)
    return costs_of(counted.captured, placement, counted.profile)
