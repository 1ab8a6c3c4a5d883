"""A layered layout: rows from top to bottom, few crossings, straight long edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import networkx as nx

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
    graph, rows, chains = _rows(len(sizes), sorted(set(edges)))
    widths = [width for width, _ in sizes] + [0.0] * (len(graph) - len(sizes))
    _uncross(rows, graph)
    centres = _centres(rows, widths, graph)
    left = min((centres[item] - widths[item] / 2 for row in rows for item in row), default=0.0)
    tops, height = _tops(rows, sizes)
    row_of = {item: number for number, row in enumerate(rows) for item in row}
    corners = tuple((centres[i] - w / 2 - left, tops[row_of[i]]) for i, (w, _) in enumerate(sizes))
    width = max((x + w for (x, _), (w, _) in zip(corners, sizes, strict=True)), default=0.0)
    routes = {}
    for source, *between, target in chains:
        bends = [(centres[i] - left, tops[row_of[i]] + BETWEEN / 2) for i in between]
        start = (centres[source] - left, corners[source][1] + sizes[source][1])
        routes[source, target] = (start, *bends, (centres[target] - left, corners[target][1]))
    return Layout(corners, routes, max(width, *(x for route in routes.values() for x, _ in route), 0.0), height)


Rows = list[list[int]]


def _rows(count: int, edges: Sequence[tuple[int, int]]) -> tuple[nx.DiGraph, Rows, list[list[int]]]:
    """Rows by the longest way; an edge over several rows has a bend in each of them, numbered after the things.

    Returns the graph of things and bends, its rows, and each edge as a chain.
    """
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(count))
    rows: Rows = [sorted(row) for row in nx.topological_generations(graph)]
    rank = {item: number for number, row in enumerate(rows) for item in row}
    chains = []
    for source, target in edges:
        bends = range(len(graph), len(graph) + rank[target] - rank[source] - 1)
        for row, bend in enumerate(bends, start=rank[source] + 1):
            rows[row].append(bend)
        chains.append([source, *bends, target])
        if bends:
            graph.remove_edge(source, target)
            nx.add_path(graph, chains[-1])
    return graph, rows, chains


def _uncross(rows: Rows, graph: nx.DiGraph) -> None:
    """Order every row by the mean place of what its items are tied to, down and up in turns."""
    for sweep in range(SWEEPS):
        near, order = (graph.pred, rows[1:]) if sweep % 2 == 0 else (graph.succ, rows[-2::-1])
        place = {item: index for row in rows for index, item in enumerate(row)}
        for row in order:
            means = {item: fmean(place[n] for n in near[item]) if near[item] else place[item] for item in row}
            row.sort(key=lambda item: means[item])
            place.update({item: index for index, item in enumerate(row)})


def _centres(rows: Rows, widths: Sequence[float], graph: nx.DiGraph) -> list[float]:
    """Horizontal centres: as near to the mean of the neighbours as the others in the row allow."""
    centres = [0.0] * len(widths)
    for row in rows:
        _spread(row, [0.0] * len(row), widths, centres)
    for sweep in range(2 * SWEEPS):
        near, order = (graph.pred, rows) if sweep % 2 == 0 else (graph.succ, rows[::-1])
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
