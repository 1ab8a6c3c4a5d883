"""What a transform did, in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxcollab.arguments import checked
from fxcollab.codegen.branches import Recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.costs import Costs, Levels, costs_of, parameter_count
from fxcollab.costs.original import ProfiledOriginal, profile_original
from fxcollab.costs.text import Entry, as_text, before_and_after
from fxcollab.functional import tensors_of
from fxcollab.plan import plan_of, training_model
from fxcollab.provenance import Provenance, provenance_of
from fxcollab.rewriting.init_rules import described
from fxcollab.tracing.capture import LIMITATIONS_KEY
from fxcollab.tree import branch_name, parse_branch_name

_SHOWN = 4


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

    def entry(self) -> Entry:
        """The line of the summary."""
        size, more = f"{self.parameters:,} parameters", len(self.nodes) - _SHOWN
        nodes = ", ".join(self.nodes[:_SHOWN]) + (f", ... {more} more" if more > 0 else "")
        if self.level == 0:
            return Entry("trunk", f"once, {size}: ", nodes or "nothing")
        place = f"{self.branches} branches behind {self.split or 'the inputs'}"
        return Entry(f"level {self.level}", f"{place}, {size} each: ", nodes or "nothing")


@dataclass(frozen=True)
class Summary:
    """A training graph against its original.

    Attributes:
        pattern, heads, seed, init: as planned.
        start: how heads start, in a sentence.
        chosen: why the splits were chosen; None where they were named.
        levels: the trunk and every level below it.
        shared, cloned, rescaled, copied: numbers of nodes that are shared by all heads, added for peers, inserted
            rescales, and inserted copies that guard against in-place writes.
        parameters: number of values in the parameters of the original and of the training model.
        costs: of a training step with SGD and momentum; None where they can't be computed.
        inputs: the inputs whose shapes the costs are for, as text, or None.
        guessed: whether these are a usual shape that fits, because none was given.
        costs_unknown: why costs can't be computed, or None.
        limitations: what of the model is not preserved, in sentences.
        recompute: what is computed again in the backward pass; None for nothing.
    """

    pattern: str
    heads: int
    seed: int
    init: str
    start: str
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

    @property
    def title(self) -> str:
        """The first line: heads, pattern, seed and how heads start."""
        again = ", heads computed again in the backward" if self.recompute else ""
        return f"{self.heads} heads, {self.pattern}, seed {self.seed}, init {self.init}{again}"

    def entries(self) -> Iterator[Entry]:
        """The lines that `str` shows below the title."""
        yield Entry("start", self.start)
        yield from (level.entry() for level in self.levels)
        yield Entry("parameters", before_and_after(self.parameters))
        if self.costs is None:
            why = self.costs_unknown or "no input is known"
            yield Entry("FLOPs", f"unknown: {why} (set --input, in Python example_inputs)")
        else:
            old, new = self.costs.original, self.costs.training
            guessed = ", guessed: set --input, in Python example_inputs" if self.guessed else ""
            flops = before_and_after((old.flops, new.flops))
            yield Entry("FLOPs", f"{flops}  a training step, input {self.inputs}{guessed}")
            memory = before_and_after((old.memory, new.memory), "B")
            yield Entry("memory", f"{memory}  its peak, with SGD and momentum")
        yield from (Entry("limitation", sentence) for sentence in self.limitations)

    def counts(self) -> tuple[str, ...]:
        """The last line's parts: numbers of nodes, each with its mark in the diff."""
        copied = (f"! {self.copied} copied before in-place writes",) if self.copied else ()
        return f"+ {self.cloned} cloned", f"~ {self.rescaled} rescaled", *copied, f"= {self.shared} shared"

    def __str__(self) -> str:
        return as_text((self.title, *self.entries(), "  ".join(self.counts())))

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return dataclasses.asdict(self) | {"costs": self.costs and self.costs.to_json()}


@checked
def summarise(train_model: nn.Module, profiled: ProfiledOriginal | None = None) -> Summary:
    """Summarise a training model; its costs are those at the inputs of its plan, or at a usual shape that fits.

    Args:
        train_model: what `transform`, `rewrite` or `load` returned, or a wrapper around it.
        profiled: what `profile_original` returned for it (default: profiled now).

    Raises:
        StateError: it is not a training model.
    """
    model = training_model(train_model)
    plan = plan_of(model)
    peers = model.get_submodule(plan.options.peers)
    profiled = profiled or profile_original(model)
    captured, options = profiled.captured, plan.options
    nodes = list(provenance_of(model.modes.train, options.peers).values())
    levels = _levels(model, captured, nodes)
    kinds = [node.kind for node in nodes]
    return Summary(
        pattern=plan.pattern,
        heads=plan.tree.heads,
        seed=options.seed,
        init=str(options.init),
        start=described(options.init, sum(not p.requires_grad for p in peers.parameters())),
        chosen=plan.chosen,
        levels=tuple(_level(captured, levels, nodes, level) for level in range(plan.tree.depth + 1)),
        shared=kinds.count("shared"),
        cloned=sum(node.kind == "clone" and any(node.branch) for node in nodes),
        rescaled=kinds.count("rescale"),
        copied=kinds.count("copy"),
        parameters=(parameter_count(model.root), parameter_count(model)),
        costs=None
        if profiled.profile is None
        else costs_of(captured, profiled.profile, levels, recompute=options.recompute),
        inputs=profiled.inputs,
        guessed=profiled.guessed,
        costs_unknown=profiled.unknown,
        limitations=tuple(model.meta.get(LIMITATIONS_KEY, ())),
        recompute=options.recompute,
    )


def _levels(train_model: CollabGraphModule, captured: CollabGraphModule, nodes: Iterable[Provenance]) -> Levels:
    """The levels on which the training graph has the nodes and the state of its original."""
    plan, own = plan_of(train_model), tensors_of(captured)
    trunk_and_first = (node for node in nodes if node.kind in ("shared", "clone") and not any(node.branch))
    found = {node.origin: len(node.branch) for node in trunk_and_first}
    levels = {node: found.get(node.name, plan.tree.depth) for node in captured.modes.train.nodes}
    state = dict.fromkeys(own, 0)
    peers = dict(getattr(train_model, plan.options.peers, nn.Module()).named_children())
    for path in sorted(filter(None, map(parse_branch_name, peers)), key=len, reverse=True):
        # a branch has the tensors of its own level, and in its modules those of the levels before
        branch = tensors_of(peers[branch_name(path)])
        state |= {name: len(path) for name, tensor in branch.items() if tensor is not own.get(name, tensor)}
    return Levels(plan.tree, levels, state)


def _level(captured: CollabGraphModule, levels: Levels, nodes: Iterable[Provenance], level: int) -> Level:
    own = [node for node in nodes if node.kind in ("shared", "clone") and node.branch == (0,) * level]
    return Level(
        level,
        levels.tree.splits[level - 1] if level and levels.tree.splits else None,
        levels.tree.branches(level),
        tuple(node.origin for node in sorted(own, key=lambda node: node.position)),
        sum(parameter.numel() for name, parameter in captured.named_parameters() if levels.state[name] == level),
    )
