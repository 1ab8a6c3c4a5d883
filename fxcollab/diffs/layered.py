"""A layered layout: rows from top to bottom, few crossings, straight long edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

Point = tuple[float, float]
APART, BETWEEN = 22.0, 28.0
"""Units between neighbours of a row, and between rows."""
SWEEPS = 8


@dataclass(frozen=True)
class Layout:
    """Where things stand.

    Attributes:
        corners: the upper left corner of each thing.
        routes: the way of each edge, from the bottom of its source to the top of its target.
        width, height: of all.
    """

    corners: tuple[Point, ...]
    routes: dict[tuple[int, int], tuple[Point, ...]]
    width: float
    height: float


def layered(sizes: Sequence[tuple[float, float]], edges: Iterable[tuple[int, int]]) -> Layout:
    """Lay out things of these sizes, numbered in an order in which no edge goes back.

    Args:
        sizes: width and height of each thing.
        edges: pairs of numbers, the smaller one first.
    """
    known = sorted(set(edges))
    rows, chains, widths = _rows(sizes, known)
    above, below = _neighbours(len(widths), chains)
    _uncross(rows, above, below)
    centres = _centres(rows, widths, above, below)
    left = min((centres[item] - widths[item] / 2 for row in rows for item in row), default=0.0)
    tops, height = _tops(rows, sizes)
    row_of = {item: number for number, row in enumerate(rows) for item in row}
    corners = tuple((centres[i] - w / 2 - left, tops[row_of[i]]) for i, (w, _) in enumerate(sizes))
    width = max((x + w for (x, _), (w, _) in zip(corners, sizes, strict=True)), default=0.0)
    routes = {}
    for source, target in known:
        bends = [(centres[i] - left, tops[row_of[i]] + BETWEEN / 2) for i in chains[source, target][1:-1]]
        start = (centres[source] - left, corners[source][1] + sizes[source][1])
        routes[source, target] = (start, *bends, (centres[target] - left, corners[target][1]))
    return Layout(corners, routes, max(width, *(x for route in routes.values() for x, _ in route), 0.0), height)


Rows = list[list[int]]


def _rows(
    sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]
) -> tuple[Rows, dict[tuple[int, int], list[int]], list[float]]:
    """Rows by the longest way; an edge over several rows has a bend of no width in each of them."""
    rank = [0] * len(sizes)
    for source, target in sorted(edges, key=lambda edge: edge[1]):  # ranks of sources are final by then
        rank[target] = max(rank[target], rank[source] + 1)
    rows: Rows = [[] for _ in range(max(rank, default=0) + 1)]
    for item, row in enumerate(rank):
        rows[row].append(item)
    widths = [width for width, _ in sizes]
    chains: dict[tuple[int, int], list[int]] = {}
    for source, target in edges:
        bends = range(len(widths), len(widths) + rank[target] - rank[source] - 1)
        for row, bend in enumerate(bends, start=rank[source] + 1):
            rows[row].append(bend)
            widths.append(0.0)
        chains[source, target] = [source, *bends, target]
    return rows, chains, widths


def _neighbours(count: int, chains: dict[tuple[int, int], list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for chain in chains.values():
        for upper, lower in pairwise(chain):
            above[lower].append(upper)
            below[upper].append(lower)
    return above, below


def _uncross(rows: Rows, above: list[list[int]], below: list[list[int]]) -> None:
    """Order every row by the mean place of what its items are tied to, down and up in turns."""
    for sweep in range(SWEEPS):
        near, order = (above, rows[1:]) if sweep % 2 == 0 else (below, rows[-2::-1])
        place = {item: index for row in rows for index, item in enumerate(row)}
        for row in order:
            means = {item: fmean(place[n] for n in near[item]) if near[item] else place[item] for item in row}
            row.sort(key=lambda item: means[item])
            place.update({item: index for index, item in enumerate(row)})


def _centres(rows: Rows, widths: Sequence[float], above: list[list[int]], below: list[list[int]]) -> list[float]:
    """Horizontal centres: as near to the mean of the neighbours as the others in the row allow."""
    centres = [0.0] * len(widths)
    for row in rows:
        _spread(row, [0.0] * len(row), widths, centres)
    for sweep in range(2 * SWEEPS):
        near, order = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in order:
            wanted = [fmean(centres[n] for n in near[item]) if near[item] else centres[item] for item in row]
            _spread(row, wanted, widths, centres)
    return centres


def _spread(row: list[int], wanted: Sequence[float], widths: Sequence[float], centres: list[float]) -> None:
    """Neighbours keep apart: the mean of pushing to the right and pushing to the left."""
    right, left = list(wanted), list(wanted)
    least = [(widths[a] + widths[b]) / 2 + APART for a, b in pairwise(row)]
    for place in range(1, len(row)):
        right[place] = max(right[place], right[place - 1] + least[place - 1])
    for place in range(len(row) - 2, -1, -1):
        left[place] = min(left[place], left[place + 1] - least[place])
    for place, item in enumerate(row):
        centres[item] = (right[place] + left[place]) / 2


def _tops(rows: Rows, sizes: Sequence[tuple[float, float]]) -> tuple[list[float], float]:
    tops, y = [], 0.0
    for row in rows:
        tops.append(y)
        y += max((sizes[item][1] for item in row if item < len(sizes)), default=0.0) + BETWEEN
    return tops, max(y - BETWEEN, 0.0)
