"""Two graphs side by side, as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["same", "changed", "rewired", "added", "removed"]
"""``changed``: it does something else. ``rewired``: it does the same with other values."""


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
    """

    name: str
    op: str
    label: str
    description: str
    inputs: tuple[str, ...]
    branch: str = ""


@dataclass(frozen=True)
class Row:
    """A node of the first graph, of the second, or one of each that were matched.

    Attributes:
        a, b: the nodes; None where there is none.
        status: how the second graph differs.
        what: how a matched node differs, in words; "" where it doesn't.
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
    """

    a: str
    b: str
    rows: tuple[Row, ...]

    def count(self, status: Status) -> int:
        """How many rows have this status."""
        return sum(row.status == status for row in self.rows)

    @cached_property
    def hunks(self) -> tuple[tuple[Row, ...], ...]:
        """Runs of rows that differ."""
        runs = groupby(self.rows, lambda row: row.status == "same")
        return tuple(tuple(run) for same, run in runs if not same)
