"""Aliasing hazards: a branch writes into a private copy of a crossing value, and an alias of that value misses it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import fx

from fxcollab.analysis.effects import Observation
from fxcollab.analysis.storages import Storages, Write, nodes_behind
from fxcollab.errors import SplitError
from fxcollab.fx_utils import place

Levels = Mapping[fx.Node, int]


def refuse_storage_that_crosses_twice(
    graph: fx.Graph,
    levels: Levels,
    storages: tuple[Storages, Storages],
    writes: Iterable[Write],
    observation: Observation,
) -> Iterator[fx.Node]:
    """Raise for another crossing alias of the storage into which a branch writes: it would miss the write.

    ``storages`` are all possible aliases, and those that are certain; ``writes`` are of branches into shallower
    values.

    Yields:
        Nodes of which the write is assumed.

    Raises:
        SplitError: with the write, and the value that would miss it.
    """
    possible, seen = storages
    entries = _entries(graph, levels, observation)
    hit = {write.node: write.roots for write in seen.writes}
    for write in writes:
        for node in nodes_behind(graph, write):
            if levels[node] < levels[write.node]:
                continue
            for source in node.all_input_nodes:
                crosses = levels[source] < levels[write.node] and source.op != "get_attr"
                others = entries[write.node] - {source}
                if source in entries[write.node]:  # each entry is copied by itself
                    views = seen.of({source}) & seen.of(others)
                else:
                    views = possible.of({source}) & write.roots
                    views |= seen.of({source}) & hit.get(write.node, frozenset())
                if crosses and views and write.assumed:
                    yield write.node
                elif crosses and views:
                    verb, hint = _OBSERVED if write.seen else _UNOBSERVED
                    written = ", ".join(sorted(other.name for other in others))
                    raise SplitError(
                        f"{write.node.name!r} {verb} in place into storage that crosses the split twice.",
                        where=place(write.node),
                        why=f"{source.name!r} may share the storage of {written} and is read after the write",
                        hint=hint,
                    )


_OBSERVED = "writes", "make the operation out-of-place, or clone the value before the split"
_UNOBSERVED = (
    "may write",
    "give example_inputs that the model takes, with which it is seen what it writes",
)


def refuse_writes_that_copies_miss(
    graph: fx.Graph, levels: Levels, storages: Storages, deeper: Sequence[Write]
) -> Iterator[fx.Node]:
    """Raise for a write into a crossing value of which branches have private copies: they would miss it.

    ``deeper`` are the writes, by branches into shallower values, for which the copies are made.

    Yields:
        Nodes of which the write is assumed.

    Raises:
        SplitError: with the write that branches would miss.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for write in deeper:
        copied = min(
            (order[reader] for reader in _readers_of_copies(graph, levels, write)), default=order[write.node]
        )
        for late in storages.writes:
            is_shallower = levels[late.node] < levels[write.node] and late.roots & write.roots
            if not is_shallower or order[late.node] < copied:
                continue
            missing = next(_readers_after(graph, levels, storages, late, write), None)
            if missing is not None and (late.assumed or write.assumed):
                yield late.node if late.assumed else write.node
            elif missing is not None:
                verb = "writes" if late.seen else "may write"
                raise SplitError(
                    f"{late.node.name!r} {verb} in place into a value of which every branch has a private copy.",
                    where=place(late.node),
                    why=f"{write.node.name!r} may write into the same value behind the split, so each branch has "
                    f"its own copy, and {missing.name!r} would miss the write before the split",
                    hint="split elsewhere, or write to a copy there (no inplace=True)",
                )


def writes_that_shallower_nodes_miss(
    graph: fx.Graph, levels: Levels, storages: Storages, deeper: Iterable[Write]
) -> Iterator[fx.Node]:
    """Nodes of assumed writes, into copies that branches have, after which nodes before the split read the value."""
    for write in deeper:
        for node in nodes_behind(graph, write) if write.assumed else ():
            if levels[node] < levels[write.node] and storages.of(node.all_input_nodes) & write.assumed:
                yield write.node
                break


def _readers_of_copies(graph: fx.Graph, levels: Levels, write: Write) -> Iterator[fx.Node]:
    """The nodes that read a private copy which their branch has because of ``write``."""
    home = levels[write.node]
    crossing = {root for root in write.roots if levels[root] < home}
    return (node for node in graph.nodes if levels[node] >= home and crossing.intersection(node.all_input_nodes))


def _readers_after(
    graph: fx.Graph, levels: Levels, storages: Storages, late: Write, write: Write
) -> Iterator[fx.Node]:
    """What reads the storage of ``late`` after it, behind the split."""
    for node in nodes_behind(graph, late):
        if storages.of(node.all_input_nodes) & late.roots and levels[node] >= levels[write.node]:
            yield node


def _entries(graph: fx.Graph, levels: Levels, observation: Observation) -> dict[fx.Node, frozenset[fx.Node]]:
    """For every node, the crossing values through which it got the storage that it writes, or that it shares."""
    shared: dict[fx.Node, frozenset[fx.Node]] = {}
    written: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        effect = observation.of(node)
        for found, sources in ((shared, effect.shares | effect.asked), (written, effect.writes)):
            own = (frozenset({s}) if levels[s] < levels[node] else shared.get(s, frozenset()) for s in sources)
            found[node] = frozenset().union(*own)
    return written
