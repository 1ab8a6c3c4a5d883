"""Rewrite: a captured model and its partition become the training model."""

from __future__ import annotations

import gc
import keyword
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxcollab.analysis.partition import Partition
from fxcollab.analysis.randomness import draws_randomly, module_draws_randomly
from fxcollab.codegen.branches import check_recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import PatternError, StateError
from fxcollab.fx_utils import place
from fxcollab.plan import PLAN_KEY, Plan, RewriteOptions
from fxcollab.rewriting.duplicate import Cut, Duplicated, duplicate
from fxcollab.rewriting.initialise import Factory, check_init, initialise
from fxcollab.rewriting.peers import State, build_peers, nest
from fxcollab.rewriting.recomputable import refuse_state_that_cannot_be_restored, refuse_writes
from fxcollab.runtime.functional_call import FunctionalCall
from fxcollab.sources.source import Source
from fxcollab.tracing.capture import CAPTURE_KEY, LIMITATIONS_KEY
from fxcollab.tracing.limitations import shared_statistics
from fxcollab.tree import Pattern, pattern_of


def rewrite(
    captured: CollabGraphModule,
    partition: Partition,
    *,
    factory: Factory | None = None,
    pattern: Pattern | None = None,
    source: Source | None = None,
    chosen: str | None = None,
    **options: Any,
) -> CollabGraphModule:
    """The training model: its forward returns a tuple with one output a head, head 0 first.

    Trunk and head 0 are the captured model's own modules and tensors; peers are new and live under ``peers``.

    Args:
        captured: what `capture` returned.
        partition: what `partition` returned for it.
        factory: makes models like the captured one, for ``init="fresh"``.
        pattern: the name of the head tree's pattern, for the plan; by default that of the built-in one.
        source: where the model came from, for the plan.
        chosen: why the splits were chosen, for the plan.
        options: the fields of `RewriteOptions`: ``init``, ``seed``, ``rescale``, ``peers`` and ``recompute``.

    Raises:
        StateError: the model has something named ``peers`` already.
        PatternError: ``init`` would leave all heads equal, or branches can't be computed again.
    """
    planned = RewriteOptions(**options)
    train_model = duplicated(captured, partition, planned, factory)
    train_model.meta[PLAN_KEY] = plan_for(captured, partition, planned, pattern, source, chosen)
    train_model.recompile()
    return train_model


def duplicated(
    captured: CollabGraphModule, partition: Partition, options: RewriteOptions, factory: Factory | None = None
) -> CollabGraphModule:
    """The training model whose forward is still to be generated, by ``recompile()``; as `rewrite` otherwise."""
    _check_name_of_peers(captured, options.peers)
    check_init(options.init, is_stochastic(captured, partition))
    check_recompute(options.recompute)
    if options.recompute:
        refuse_writes(partition)
    _check_partition(captured, partition)
    state = State(captured.root, partition.modules, partition.state)
    branches = build_peers(state, partition.tree)
    initialise(branches, state, partition.tree, options.init, options.seed, factory)
    peers = nest(branches)
    with _collector_paused():
        graphs = {graph: duplicate(Cut.of(graph, captured, partition, options)) for graph in captured.modes}
        for result in graphs.values():
            _add_functional_calls(peers, options.peers, captured, result)
        train_model = CollabGraphModule(
            captured.root,
            captured.modes.map(lambda graph: graphs[graph].graph),
            constants={name: getattr(captured, name) for name in captured.constants},
            peers={options.peers: peers},
            recompute=options.recompute,
            generate=False,
        )
    if options.recompute:
        for graph in train_model.modes:
            refuse_state_that_cannot_be_restored(graph, train_model)
    shared = shared_statistics(partition.straddling & dict(captured.named_buffers(remove_duplicate=False)).keys())
    train_model.meta[LIMITATIONS_KEY] = (*captured.meta[LIMITATIONS_KEY], *shared)
    return train_model


def plan_for(
    captured: CollabGraphModule,
    partition: Partition,
    options: RewriteOptions,
    pattern: Pattern | None = None,
    source: Source | None = None,
    chosen: str | None = None,
) -> Plan:
    """The plan of a training model; arguments are those of `rewrite`."""
    how, init = captured.meta[CAPTURE_KEY], options.init
    named = init if isinstance(init, str) else getattr(init, "__qualname__", repr(init))
    return Plan(
        pattern or pattern_of(partition.tree),
        partition.tree,
        replace(options, init=named),
        how.granularity,
        how.interface,
        source,
        chosen,
    )


def _check_name_of_peers(captured: CollabGraphModule, peers: str) -> None:
    if not peers.isidentifier() or keyword.iskeyword(peers):
        raise StateError(f"{peers!r} can't be the name of the peers.", hint="give a Python name: peers='heads'")
    if hasattr(captured, peers):
        raise StateError(
            f"The model has an attribute {peers!r} of its own.",
            where=f"{type(captured.root).__qualname__}.{peers}",
            why="the peers of the other heads would live under that name",
            hint="give another: transform(..., peers='heads') (--peers heads)",
        )


def _check_partition(captured: CollabGraphModule, partition: Partition) -> None:
    for graph in captured.modes:
        changed = set(graph.nodes) ^ partition.nodes.get(graph, {}).keys()
        if changed:
            raise PatternError(
                "The captured graph was edited after it was partitioned.",
                where=place(min(changed, key=lambda node: node.name)),
                why="nodes were added or removed, so the levels are those of another graph",
                hint="partition it again, for a pass: replace(stage, partition=partition(stage.captured, tree))",
            )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Making a graph makes thousands of objects that stay: Python would look for cycles in them over and over."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def is_stochastic(captured: CollabGraphModule, partition: Partition) -> bool:
    """Whether anything that is duplicated draws random numbers."""
    return any(
        _draws(node, captured) for levels in partition.nodes.values() for node, level in levels.items() if level > 0
    )


def _draws(node: fx.Node, captured: nn.Module) -> bool:
    if node.op == "call_module":
        return module_draws_randomly(captured.get_submodule(str(node.target)))
    return draws_randomly(node)


def _add_functional_calls(nested: nn.Module, peers: str, captured: nn.Module, result: Duplicated) -> None:
    """Put what is called with shallower parameters beside the branches, before code is made that calls it."""
    for target, module in result.functional.items():
        _, *path, leaf = target.split(".")
        owner = nested
        for atom in path:
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        of_peer, own = module.startswith(f"{peers}."), module.removeprefix(f"{peers}.")
        owner.add_module(leaf, FunctionalCall((nested if of_peer else captured).get_submodule(own)))
