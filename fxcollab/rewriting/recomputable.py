"""Which graphs can be run branch by branch, and each branch twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from fxcollab.analysis.effects import Write
from fxcollab.codegen.branches import in_branches
from fxcollab.codegen.order import parts_of, swapped_calls
from fxcollab.errors import PatternError
from fxcollab.fx_utils import place
from fxcollab.module_state.holders import iterator_in
from fxcollab.provenance import provenance


def refuse_writes_out_of_order(graph: fx.Graph, levels: Mapping[fx.Node, int], writes: tuple[Write, ...]) -> None:
    """Refuse what a branch would see differently if all shallower nodes had run before it, or if it ran again.

    Args:
        graph: a captured graph.
        levels: the level of every node.
        writes: in-place writes into the storage of values that cross.

    Raises:
        PatternError: a value is written after a deeper branch has read it, or a branch writes into shallower state.
    """
    positions = {node: position for position, node in enumerate(graph.nodes)}
    for write in writes:
        for root in write.roots:
            for reader in _early_readers(write, root, levels, positions):
                raise _refusal(write, f"{reader.name!r}, which lies behind a split, reads {root.name!r} before it")
            if root.op == "get_attr" and levels[root] < levels[write.node]:
                raise _refusal(write, f"what it writes into, {root.target}, belongs to a shallower level")


def refuse_calls_out_of_order(graph: fx.Graph, train_model: nn.Module) -> None:
    """Refuse modules with state that would be called in another order, branch by branch, than in the graph.

    Raises:
        PatternError: with both calls.
    """
    swapped = swapped_calls(graph, in_branches(graph), train_model)
    if swapped:
        first, second = swapped
        raise PatternError(
            "Branches can't be computed again: a module with state is called in several of them.",
            where=place(second),
            why=f"{second.name!r} would run before {first.name!r}, and both call {str(provenance(first).target)!r}",
            hint="leave recompute out, or put the splits before or behind all calls of the module",
        )


def refuse_what_is_not_held(graph: fx.Graph, train_model: nn.Module) -> None:
    """Refuse branches with state that can't be gone back to: that of scripted modules, and iterators.

    Raises:
        PatternError: with the node that calls it.
    """
    for node in graph.nodes:
        if node.op != "call_module" or not provenance(node).branch:
            continue
        module = train_model.get_submodule(str(node.target))
        scripted = any(isinstance(part, torch.jit.ScriptModule) and part._buffers for part in parts_of(module))
        if scripted or (found := iterator_in(parts_of(module))):
            raise PatternError(
                "A branch can't be computed again: it may keep state that can't be gone back to.",
                where=place(node),
                why="a scripted module has buffers" if scripted else f"{found} is an iterator",
                hint="leave recompute out, or put the splits behind it",
            )


def _early_readers(
    write: Write, root: fx.Node, levels: Mapping[fx.Node, int], positions: Mapping[fx.Node, int]
) -> Iterator[fx.Node]:
    for reader in root.users:
        if positions[reader] < positions[write.node] and levels[reader] > levels[write.node]:
            yield reader


def _refusal(write: Write, why: str) -> PatternError:
    return PatternError(
        "Branches can't be computed again: a value is written in place.",
        where=place(write.node),
        why=why,
        hint="leave recompute out, or compute a new value instead of writing into one",
    )
