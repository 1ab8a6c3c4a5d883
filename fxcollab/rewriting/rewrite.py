"""Rewrite: a captured model and its partition become the training model."""

from __future__ import annotations

import gc
import keyword
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from fxcollab.analysis.partition import Partition
from fxcollab.analysis.randomness import draws_randomly, module_draws_randomly
from fxcollab.codegen.branches import Recompute, check_recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import StateError
from fxcollab.rewriting.duplicate import Cut, Duplicated, duplicate
from fxcollab.rewriting.initialise import Factory, Init, check_init, initialise
from fxcollab.rewriting.peers import State, build_peers, nest
from fxcollab.rewriting.recomputable import (
    refuse_calls_out_of_order,
    refuse_what_is_not_held,
    refuse_writes_out_of_order,
)
from fxcollab.runtime.functional_call import FunctionalCall


def rewrite(
    captured: CollabGraphModule,
    partition: Partition,
    *,
    init: Init = "fresh",
    seed: int = 0,
    factory: Factory | None = None,
    rescale: bool = True,
    peers: str = "peers",
    recompute: Recompute | None = None,
) -> CollabGraphModule:
    """The training model: its forward returns a tuple with one output a head, head 0 first.

    Trunk and head 0 are the captured model's own modules and tensors; peers are new and live under ``peers``.

    Args:
        captured: what `capture` returned.
        partition: what `partition` returned for it.
        init: how peers start: ``fresh``, ``copy``, ``copy-anyway`` or ``callable(module, path)``, which is
            called with each branch's module and name and finds copies of the weights there.
        seed: what the initialisation draws from.
        factory: makes models like the captured one, for ``fresh``.
        rescale: False leaves the rescale nodes out (table 3's "no scaling").
        peers: the name under which peers live.
        recompute: ``heads`` to keep the activations of the trunk and of one branch at a time, and to compute the
            others again in the backward pass.

    Raises:
        StateError: the model has something of that name already.
        PatternError: ``init`` would leave all heads equal, or branches can't be computed again.
    """
    if not peers.isidentifier() or keyword.iskeyword(peers):
        raise StateError(f"{peers!r} can't be the name of the peers.", hint="give a Python name: peers='heads'")
    if hasattr(captured, peers):
        raise StateError(
            f"The model has an attribute {peers!r} of its own.",
            where=f"{type(captured.root).__qualname__}.{peers}",
            why="the peers of the other heads would live under that name",
            hint="give another: transform(..., peers='heads') (--peers heads)",
        )
    check_init(init, is_stochastic(captured, partition))
    check_recompute(recompute)
    if recompute:
        for graph in captured.modes:
            refuse_writes_out_of_order(graph, partition.nodes[graph], partition.writes[graph])
    state = State(captured.root, partition.modules, partition.state)
    branches = build_peers(state, partition.tree)
    initialise(branches, state, partition.tree, init, seed, factory)
    nested = nest(branches)
    with _collector_paused():
        duplicated = {
            graph: duplicate(
                Cut(
                    graph,
                    partition.nodes[graph],
                    partition.writes[graph],
                    partition.modules,
                    partition.state,
                    partition.tree,
                    captured,
                    peers,
                    rescale,
                )
            )
            for graph in captured.modes
        }
        modes = captured.modes.map(lambda graph: duplicated[graph].graph)
        constants = {name: getattr(captured, name) for name in captured.constants}
        for result in duplicated.values():
            _add_fed(nested, peers, captured, result)
        train_model = CollabGraphModule(
            captured.root, modes, constants=constants, peers={peers: nested}, recompute=recompute
        )
    if recompute:
        for graph in modes:
            refuse_calls_out_of_order(graph, train_model)
            refuse_what_is_not_held(graph, train_model)
    return train_model


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


def _add_fed(nested: nn.Module, peers: str, captured: nn.Module, result: Duplicated) -> None:
    """Put what is fed with shallower parameters beside the branches, before code is made that calls it."""
    for target, module in result.fed.items():
        _, *path, leaf = target.split(".")
        owner = nested
        for atom in path:
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        of_peer, own = module.startswith(f"{peers}."), module.removeprefix(f"{peers}.")
        owner.add_module(leaf, FunctionalCall((nested if of_peer else captured).get_submodule(own)))
