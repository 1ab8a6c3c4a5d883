"""Which branches can be computed again in the backward pass."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxcollab.analysis.partition import Partition
from fxcollab.errors import PatternError
from fxcollab.fx_utils import place
from fxcollab.provenance import META_KEY
from fxcollab.runtime.functional_call import parts_of


def refuse_writes(partition: Partition) -> None:
    """Raise where a second pass would write twice into shallower state, or read what was written after the first.

    Raises:
        PatternError: with the write.
    """
    for graph, levels in partition.nodes.items():
        position = {node: number for number, node in enumerate(graph.nodes)}
        for write in partition.writes[graph]:
            level = levels[write.node]
            for value in write.roots:
                if value.op == "get_attr" and levels[value] < level:
                    why = f"what it writes into, {value.target}, belongs to a shallower level"
                elif value.op != "get_attr" and any(
                    levels[reader] > level >= levels[value] and position[reader] < position[write.node]
                    for reader in value.users
                ):
                    why = f"a branch that is computed again would read {value.name} after the write, not before"
                else:
                    continue
                raise PatternError(
                    "Branches can't be computed again: a value is written in place.",
                    where=place(write.node),
                    why=why,
                    hint="leave recompute out, or compute a new value instead of writing into one",
                )


def refuse_scripted_buffers(graph: fx.Graph, train_model: nn.Module) -> None:
    """Raise for branches that call scripted modules with buffers, which can't be replaced for the second pass.

    Raises:
        PatternError: with the node that calls one.
    """
    for node in graph.nodes:
        if node.op != "call_module" or not node.meta[META_KEY].branch:
            continue
        parts = parts_of(train_model.get_submodule(str(node.target)))
        if any(isinstance(part, torch.jit.ScriptModule) and part._buffers for part in parts):
            raise PatternError(
                "A branch can't be computed again: it may keep state that can't be restored.",
                where=place(node),
                why="a scripted module has buffers",
                hint="leave recompute out, or put the splits behind it",
            )
