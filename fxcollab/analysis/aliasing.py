"""Refusals of storage that duplication would tear apart.

A branch that writes in place into a crossing value works on a copy of its own. What else is known of that storage,
under another name or by a write beside the split, does not reach the copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import fx

from fxcollab.analysis.effects import EffectAnalysis, Storages, Write
from fxcollab.errors import SplitError
from fxcollab.fx_utils import place

Levels = Mapping[fx.Node, int]


def refuse_storage_that_crosses_twice(
    graph: fx.Graph,
    levels: Levels,
    storages: tuple[Storages, Storages],
    writes: Iterable[Write],
    effects: EffectAnalysis,
) -> None:
    """Each branch writes into a copy of its own; another crossing view of the same storage would miss it.

    Args:
        graph: a captured graph.
        levels: of its nodes.
        storages: what may share storage, and what of it was seen to.
        writes: those of branches into storage of shallower levels.
        effects: what nodes do to their inputs.

    Raises:
        SplitError: with the write, and the value that would miss it.
    """
    possible, seen = storages
    entries = _entries(graph, levels, effects)
    hit = {write.node: write.roots for write in seen.writes}
    for write in writes:
        behind = False
        for node in graph.nodes:
            behind = behind or node is write.node
            if not behind or node is write.node or not write.certain or levels[node] < levels[write.node]:
                continue
            for source in node.all_input_nodes:
                crosses = levels[source] < levels[write.node] and source.op != "get_attr"
                views = source not in write.roots and possible.roots.get(source, frozenset()) & write.roots
                views = views or seen.roots.get(source, frozenset()) & hit.get(write.node, frozenset())
                if crosses and source not in entries[write.node] and views:
                    written = ", ".join(sorted(root.name for root in entries[write.node]))
                    raise SplitError(
                        f"{write.node.name!r} writes in place into storage that crosses the split twice.",
                        where=place(write.node),
                        why=f"{source.name!r} may share the storage of {written} and is read after the write",
                        hint="make the operation out-of-place, or clone the value before the split",
                    )


def refuse_writes_that_copies_miss(
    graph: fx.Graph, levels: Levels, storages: Storages, deeper: Sequence[Write]
) -> None:
    """A branch that may write into a crossing value has a copy of it, which a later write beside it can't reach.

    Args:
        graph: a captured graph.
        levels: of its nodes.
        storages: what may share storage.
        deeper: the writes of branches into storage of shallower levels.

    Raises:
        SplitError: with the write that branches would miss.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for write in deeper:
        copied = min(
            (order[reader] for reader in _readers_of_copies(graph, levels, write)), default=order[write.node]
        )
        for late in storages.writes:
            beside = levels[late.node] < levels[write.node] and late.roots & write.roots
            if not beside or order[late.node] < copied:
                continue
            missing = next(_readers_after(graph, levels, storages, late, write), None)
            if missing is not None:
                verb = "writes" if late.certain else "may write"
                raise SplitError(
                    f"{late.node.name!r} {verb} in place into a value of which every branch has a copy.",
                    where=place(late.node),
                    why=f"{write.node.name!r} may write into the same value behind the split, so each branch has "
                    f"its own, and {missing.name!r} would not see what is written beside it",
                    hint="split elsewhere, or write to a copy there (no inplace=True)",
                )


def _readers_of_copies(graph: fx.Graph, levels: Levels, write: Write) -> Iterator[fx.Node]:
    """The nodes that read a crossing value of which their branch has a copy because of ``write``."""
    home = levels[write.node]
    crossing = {root for root in write.roots if levels[root] < home}
    return (node for node in graph.nodes if levels[node] >= home and crossing.intersection(node.all_input_nodes))


def _readers_after(
    graph: fx.Graph, levels: Levels, storages: Storages, late: Write, write: Write
) -> Iterator[fx.Node]:
    """What reads the storage of ``late`` after it, behind the split."""
    after = itertools.dropwhile(lambda node: node is not late.node, graph.nodes)
    for node in itertools.islice(after, 1, None):
        reads = any(storages.roots.get(source, frozenset()) & late.roots for source in node.all_input_nodes)
        if reads and levels[node] >= levels[write.node]:
            yield node


def _entries(graph: fx.Graph, levels: Levels, effects: EffectAnalysis) -> dict[fx.Node, frozenset[fx.Node]]:
    """For every node, the crossing values through which it got the storage that it writes, or that it shares."""
    shared: dict[fx.Node, frozenset[fx.Node]] = {}
    written: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        effect = effects.of(node)
        for found, sources in ((shared, effect.shares), (written, effect.writes)):
            own = (frozenset({s}) if levels[s] < levels[node] else shared.get(s, frozenset()) for s in sources)
            found[node] = frozenset().union(*own)
    return written
