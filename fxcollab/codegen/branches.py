"""Code that runs branch by branch, each branch a function that is computed again in the backward pass.

The graph stays as it is. A copy of it, in the order of its branches, is what code is generated from; the statements
of each branch then become a function of what the branch reads:

    def branch_b0_1(rescale_1):
        layer4_b0_1 = self.peers.b0_1.layer4(rescale_1);  rescale_1 = None
        return layer4_b0_1
    layer4_b0_1 = fxcollab_recompute(branch_b0_1, (self.peers.b0_1.layer4,), rescale_1)

A branch is followed by those that lie behind it, then by its sibling: ``b0, b0_0, b0_1, b1, b1_0, b1_1``. A node
depends on its own branch and on those before it, so this is an order of the data flow too; and in the backward pass
the gradient of one branch's result is used up before the sibling's is made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal, TypeAlias

from torch import fx, nn

from fxcollab._torch import codegen_of, format_target
from fxcollab.codegen.order import may_change, parts_of
from fxcollab.codegen.statements import CALLS, by_node, freed, fresh, function, names_of, one_or_tuple, parenthesised
from fxcollab.errors import PatternError
from fxcollab.fx_utils import copy_graph
from fxcollab.provenance import provenance
from fxcollab.runtime.compiled import leave_alone
from fxcollab.runtime.recompute import recompute
from fxcollab.tree import Path, branch_name

Recompute: TypeAlias = Literal["heads"]


def check_recompute(recompute: str | None) -> None:
    """Refuse what can't be computed again.

    Raises:
        PatternError: it is neither None nor ``heads``.
    """
    if recompute not in (None, "heads"):
        raise PatternError(
            f"There is nothing to recompute that is called {recompute!r}.",
            hint="say recompute='heads' (--recompute heads), or leave it out",
        )


@dataclass(frozen=True)
class _Segment:
    """The nodes of one branch.

    Attributes:
        name: of the function that they become.
        first, last: positions of its first and last node in the order of the branches.
        inputs: what it reads of other branches.
        outputs: what other branches read of it.
        spent: inputs that nothing reads after it.
        stateful: expressions for modules that it may change, and pairs of a module and a name for tensors it reads.
    """

    name: str
    first: int
    last: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spent: tuple[str, ...]
    stateful: tuple[str, ...]


def branch_by_branch(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """A copy of a training graph whose code runs branch by branch, each under `recompute`.

    Args:
        graph: the graph, which stays as it is.
        root: the module that targets refer to.

    Raises:
        StateError: a node was added that belongs to no branch.
    """
    leave_alone()
    ordered = copy_graph(graph, in_branches(graph))
    codegen: Any = copy.copy(codegen_of(graph))
    codegen.additional_globals = lambda: [("fxcollab_recompute", recompute)]
    ordered.set_codegen(codegen)
    ordered.on_generate_code(lambda _: partial(_in_functions, segments=tuple(_segments(ordered, root))))
    return ordered


def in_branches(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a training graph, each branch before those behind it and before its siblings."""
    return sorted(graph.nodes, key=_place)


def _place(node: fx.Node) -> tuple[int, Path]:
    """Inputs, then the trunk and every branch before those behind it, then the output."""
    if node.op == "placeholder":
        return 0, ()
    branch = provenance(node).branch
    return (2, ()) if node.op == "output" else (1, branch)


def _segments(ordered: fx.Graph, root: nn.Module) -> Iterator[_Segment]:
    positions = {node: position for position, node in enumerate(ordered.nodes)}
    taken = {node.name for node in ordered.nodes}
    for (_, branch), found in groupby(list(ordered.nodes), key=_place):
        nodes = list(found)
        if not branch or not any(node.op in CALLS for node in nodes):
            continue
        inside = set(nodes)
        read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
        last = positions[nodes[-1]]
        yield _Segment(
            name=fresh(f"branch_{branch_name(branch)}", taken),
            first=positions[nodes[0]],
            last=last,
            inputs=names_of(read),
            outputs=names_of(node for node in nodes if any(user not in inside for user in node.users)),
            spent=names_of(node for node in read if all(positions[user] <= last for user in node.users)),
            stateful=tuple(dict.fromkeys(_stateful(nodes, root))),
        )


def _stateful(nodes: Iterable[fx.Node], root: nn.Module) -> Iterator[str]:
    """What nodes call and read that isn't the same at every call."""
    for node in nodes:
        target: Any = node.target  # a text that prints itself between quotes
        if node.op == "call_module" and any(map(may_change, parts_of(root.get_submodule(target)))):
            yield format_target("self", target)
        elif node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            if name not in root.get_submodule(owner)._parameters:
                yield f"({format_target('self', owner) if owner else 'self'}, {name!r})"


def _in_functions(body: Sequence[str], segments: Sequence[_Segment]) -> list[str]:
    """The statements of a forward, those of each segment put into a function."""
    statements = by_node(body)
    for segment in segments:
        own = slice(segment.first, segment.last + 1)
        branch = function(segment.name, segment.inputs, "".join(statements[own]), one_or_tuple(segment.outputs))
        statements[own] = [
            branch + _call(segment),
            *[""] * (segment.last - segment.first),
        ]  # later ones stay in place
    return statements


def _call(segment: _Segment) -> str:
    arguments = ", ".join((segment.name, parenthesised(segment.stateful), *segment.inputs))
    return f"{one_or_tuple(segment.outputs)} = fxcollab_recompute({arguments}){freed(segment.spent)}\n"
