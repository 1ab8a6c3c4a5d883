"""Two graphs side by side, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal, TypeAlias

from fxcollab.tree import HeadTree, Path

Status: TypeAlias = Literal["same", "changed", "rewired", "added", "removed"]
"""``changed``: it does something else. ``rewired``: it does the same with other values."""
SIGNS: Mapping[Status, tuple[str, str]] = {
    "removed": ("-", "only in A"),
    "added": ("+", "only in B"),
    "changed": ("~", "does something else"),
    "rewired": (">", "reads other values"),
    "same": ("=", "the same in both"),
}
"""For every status a sign of one character, and what it means."""


@dataclass(frozen=True)
class GraphNode:
    """A node of one of two graphs.

    Attributes:
        name: in its graph.
        op: as in ``torch.fx``.
        label: what it does, in a word: the module's class, the function's name.
        description: the same with all options that aren't values of other nodes.
        inputs: the names of the nodes that it reads.
        branch: of a training model the branch it belongs to, "" for the trunk and in other graphs.
        path: the same as a path.
        origin: of a training model the captured node it was made from; its own name in other graphs.
        module: the path of the module in whose forward it stands.
        mark: of a node that was inserted on the way of a value, in a word what it does; "" for others.
    """

    name: str
    op: str
    label: str
    description: str
    inputs: tuple[str, ...]
    branch: str = ""
    path: Path = ()
    origin: str = ""
    module: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A node of the first graph, of the second, or one of each that were matched.

    Attributes:
        a, b: the nodes; None where there is none.
        status: how the second graph differs.
        what: how a matched node differs, in words, or that a module is no node of the other graph because it was
            opened there; else "".
    """

    a: GraphNode | None
    b: GraphNode | None
    status: Status
    what: str = ""


@dataclass(frozen=True)
class ComparisonData:
    """Two graphs, row by row in the order of the second.

    Attributes:
        a, b: what the two are, in a few words.
        rows: all nodes of both.
        trees: their head trees; None of a graph without one.
    """

    a: str
    b: str
    rows: tuple[Row, ...]
    trees: tuple[HeadTree | None, HeadTree | None] = (None, None)

    def count(self, status: Status) -> int:
        """How many rows have this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def facts(self) -> str:
        """Counts, in a line."""
        return ", ".join(f"{self.count(status)} {status}" for status in SIGNS)

    @cached_property
    def hunks(self) -> tuple[tuple[Row, ...], ...]:
        """Runs of rows that differ."""
        runs = groupby(self.rows, lambda row: row.status == "same")
        return tuple(tuple(run) for same, run in runs if not same)
