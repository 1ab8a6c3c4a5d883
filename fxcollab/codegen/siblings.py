"""Code that runs the branches of a level as one: the same computation with other weights.

The graph stays as it is. A copy of it, level by level, is what code is generated from; of each level the statements
of the first branch become a function of what a branch owns and of what it reads, and one call gives the results of
all its siblings:

    def branch_b0(self, rescale):
        layer3 = self.layer3(rescale);  rescale = None
        return (layer3,)
    (layer3,), (layer3_b1,) = fxcollab_batched(branch_b0, (
        dict(layer3=self.layer3),
        dict(layer3=self.peers.b1.layer3),
    ), ((rescale,), (rescale,)))
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import fx
from torch.fx.graph import _format_target

from fxcollab.codegen.statements import CALLS, by_node, freed, fresh, function, names_of, parenthesised
from fxcollab.errors import StateError
from fxcollab.graphs import copy_graph, map_inputs, place
from fxcollab.provenance import provenance
from fxcollab.runtime import batched
from fxcollab.runtime.compiled import leave_alone
from fxcollab.tree import Path, branch_name


@dataclass(frozen=True)
class _Level:
    """The branches of one level.

    Attributes:
        name: of the function that the first branch becomes.
        first, last: positions of the level's first and last node.
        kept: positions of the first branch's nodes.
        parameters: what the first branch reads of other levels, in its own names.
        inputs: for each branch, what it reads there.
        outputs: for each branch, what other levels read of it.
        returned: the first branch's names of these.
        owned: for each branch, targets of its modules and tensors by the names in the function.
        spent: inputs that nothing reads after it.
    """

    name: str
    first: int
    last: int
    kept: tuple[int, ...]
    parameters: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]
    returned: tuple[str, ...]
    owned: tuple[Mapping[str, str], ...]
    spent: tuple[str, ...]


def level_by_level(graph: fx.Graph) -> fx.Graph:
    """A copy of a training graph whose code runs the branches of a level as one, under `batched`.

    Args:
        graph: the graph, which stays as it is.

    Raises:
        StateError: the graph was edited so that branches no longer compute the same, or a node belongs to none.
    """
    leave_alone()
    ordered = copy_graph(graph, in_levels(graph))
    levels = tuple(_levels(ordered))
    codegen: Any = copy.copy(graph._codegen)
    codegen._body_transformer = partial(_in_functions, levels=levels)
    codegen.additional_globals = lambda: [("fxcollab_batched", batched)]
    ordered.set_codegen(codegen)
    return ordered


def owned_by_level(graph: fx.Graph) -> list[tuple[Mapping[str, str], ...]]:
    """For each level and each of its branches the targets of what it owns, by names that siblings have in common.

    Raises:
        StateError: as of `level_by_level`.
    """
    return [level.owned for level in _levels(copy_graph(graph, in_levels(graph)))]


def in_levels(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a training graph, shallow levels first; within a level they keep their order."""
    return sorted(graph.nodes, key=_depth)


def _depth(node: fx.Node) -> float:
    if node.op == "placeholder":
        return -1
    return float("inf") if node.op == "output" else len(provenance(node).branch)


def _levels(ordered: fx.Graph) -> Iterator[_Level]:
    positions = {node: position for position, node in enumerate(ordered.nodes)}
    taken = {node.name for node in ordered.nodes}
    for depth, found in groupby(list(ordered.nodes), key=_depth):
        nodes = list(found)
        if 0 < depth < float("inf") and any(node.op in CALLS for node in nodes):
            yield _level(nodes, positions, taken)


def _level(nodes: Sequence[fx.Node], positions: Mapping[fx.Node, int], taken: set[str]) -> _Level:
    branches: dict[Path, list[fx.Node]] = {}
    for node in nodes:
        branches.setdefault(provenance(node).branch, []).append(node)
    first, inside, last = branches[min(branches)], set(nodes), positions[nodes[-1]]
    alike = [_alike(first, branches[path], inside) for path in sorted(branches)]
    read = dict.fromkeys(source for node in first for source in node.all_input_nodes if source not in inside)
    returned = [node for node in first if any(_read_outside(values[node], inside) for values in alike)]
    sources = dict.fromkeys(values[source] for values in alike for source in read)
    return _Level(
        name=fresh(f"branch_{branch_name(min(branches))}", taken),
        first=positions[nodes[0]],
        last=last,
        kept=tuple(positions[node] for node in first),
        parameters=names_of(read),
        inputs=tuple(names_of(values[source] for source in read) for values in alike),
        outputs=tuple(
            tuple(values[node].name if _read_outside(values[node], inside) else "_" for node in returned)
            for values in alike
        ),
        returned=names_of(returned),
        owned=_owned(first, alike),
        spent=names_of(node for node in sources if all(positions[user] <= last for user in node.users)),
    )


def _read_outside(node: fx.Node, inside: Collection[fx.Node]) -> bool:
    return any(user not in inside for user in node.users)


def _alike(first: Sequence[fx.Node], other: Sequence[fx.Node], inside: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each node of the first branch and for each that it reads, the one of another branch.

    Raises:
        StateError: they don't compute the same.
    """
    values: dict[fx.Node, fx.Node] = {}
    if len(first) != len(other):
        raise _unlike(first[0], other[0])
    for one, node in zip(first, other, strict=True):
        here, there = provenance(one), provenance(node)
        sources = zip(one.all_input_nodes, node.all_input_nodes, strict=False)
        values |= {source: peer for source, peer in sources if source not in inside and source not in values}
        same = (one.op, here.kind, here.origin, here.target) == (node.op, there.kind, there.origin, there.target)
        if not same or len(one.all_input_nodes) != len(node.all_input_nodes):
            raise _unlike(one, node)
        if map_inputs((one.args, one.kwargs), values.__getitem__) != (node.args, node.kwargs):
            raise _unlike(one, node)
        values[one] = node
    return values


def _unlike(one: fx.Node, other: fx.Node) -> StateError:
    return StateError(
        "Branches can't be run as one: they don't compute the same.",
        where=place(other),
        why=f"it differs from {one.name!r} of the first branch",
        hint="batch the branches of a graph as transform made it, and run other passes after pruning",
    )


def _owned(first: Sequence[fx.Node], alike: Sequence[Mapping[fx.Node, fx.Node]]) -> tuple[dict[str, str], ...]:
    """Names in the function for what each branch has of its own, and where it stands; nodes get these as targets."""
    owned: list[dict[str, str]] = [{} for _ in alike]
    names: dict[tuple[Any, ...], str] = {}
    taken: set[str] = set()
    targets = {node: tuple(str(values[node].target) for values in alike) for node in first}
    for node, places in targets.items():
        if node.op not in ("call_module", "get_attr"):
            continue
        if places not in names:
            flat = places[0].replace(".", "_")
            names[places] = fresh(flat if flat.isidentifier() else f"own_{flat}", taken)
            for own, target in zip(owned, places, strict=True):
                own[names[places]] = target
        node.target = names[places]
    return tuple(owned)


def _in_functions(body: Sequence[str], levels: Sequence[_Level]) -> list[str]:
    """The statements of a forward, those of each level's first branch put into a function."""
    statements = by_node(body)
    for level in levels:
        own = "".join(statements[position] for position in level.kept)
        branch = function(level.name, ("self", *level.parameters), own, parenthesised(level.returned))
        statements[level.first : level.last + 1] = [branch + _call(level), *[""] * (level.last - level.first)]
    return statements


def _call(level: _Level) -> str:
    owned = "".join(f"    dict({', '.join(map(_keyword, own, own.values()))}),\n" for own in level.owned)
    results, inputs = (
        ", ".join(parenthesised(names) for names in several) for several in (level.outputs, level.inputs)
    )
    return f"{results} = fxcollab_batched({level.name}, (\n{owned}), ({inputs})){freed(level.spent)}\n"


def _keyword(name: str, target: str) -> str:
    return f"{name}={_format_target('self', target)}"
