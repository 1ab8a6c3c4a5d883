"""What is drawn: rows that all lanes share, cells in lanes, wires between cells; of one difference or of two graphs.

A row is a node of the inference graph, a lane a head; of two graphs, each has lanes of its own on rows in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fxcollab.tree import HeadTree, Path

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Item:
    """A node of a graph that is drawn; items are numbered in their order.

    Attributes:
        side: the number of its graph.
        key: of its row: nodes with one key, such as a node and its clones, stand side by side.
        path: of its branch.
        kind: how it differs, as in the legend.
        first, second: what is written in its cell.
        inputs: the numbers of what it reads.
        module: the path of the module in whose forward it stands.
        mark: what stands on the way of a value in place of a cell: a factor, a copy; "" for a cell.
        rewired: whether it reads other values than its counterpart.
        output: whether it is the output, of which every head has a part.
    """

    side: int
    key: str
    path: Path
    kind: str
    first: str
    second: str
    inputs: tuple[int, ...]
    module: str = ""
    mark: str = ""
    rewired: bool = False
    output: bool = False


@dataclass(frozen=True)
class Cell:
    """A node, by its number, in its row and lane; the rest as in `Item`."""

    node: int
    row: int
    lane: int
    kind: str
    first: str
    second: str
    rewired: bool


@dataclass(frozen=True)
class Wire:
    """A value's way from one cell to another, by their numbers.

    Attributes:
        source, target: the cells.
        mark: what stands where it leaves the source; "" for nothing.
        inserted: the numbers of the nodes behind the mark.
    """

    source: int
    target: int
    mark: str
    inserted: tuple[int, ...]


@dataclass(frozen=True)
class Lane:
    """A column: what stands above it, the number of its side, whether it is equal to the first of its side."""

    title: str
    note: str
    side: int
    merges: bool


@dataclass(frozen=True)
class Key:
    """A line of the legend: a kind, its sign, what it means, and how many nodes are of it."""

    kind: str
    sign: str
    meaning: str
    count: int


@dataclass(frozen=True)
class Drawing:
    """What stands where.

    Attributes:
        lanes: from left to right, those of a side together.
        modules: for each row the path of the module in which it stands, and its level on each side.
        splits: for each side the rows before which it splits, with what is said of them, in two lines.
        cells, wires: in the rows and lanes.
    """

    lanes: tuple[Lane, ...]
    modules: tuple[tuple[str, tuple[int, ...]], ...]
    splits: tuple[tuple[tuple[int, str, str], ...], ...]
    cells: tuple[Cell, ...]
    wires: tuple[Wire, ...]


@dataclass(frozen=True)
class Scene:
    """All that a picture and a page show.

    Attributes:
        title, facts: what it is, each in a line.
        sides: what each of the graphs is; one, or two.
        drawing: what stands where.
        legend: every kind that may be seen.
        columns: the names of what is known of a node.
        nodes: the same in this order, None where there is nothing: its name, its kind, ..., the numbers it reads.
        hunks: numbers of nodes that differ, those that stand together in one.
        notes: sentences to be read beside the picture, under headings.
        checks: of the proof: name, whether it holds, details; None where there was none.
    """

    title: str
    facts: str
    sides: tuple[str, ...]
    drawing: Drawing
    legend: tuple[Key, ...]
    columns: tuple[str, ...]
    nodes: tuple[tuple[Any, ...], ...]
    hunks: tuple[tuple[int, ...], ...]
    notes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    checks: tuple[tuple[str, bool, str], ...] | None = None


def drawing_of(items: Sequence[Item], trees: Sequence[HeadTree | None], heads: Sequence[tuple[str, str]]) -> Drawing:
    """Rows in the items' order along what they read, a lane a head.

    Args:
        items: of all sides.
        trees: of each side the head tree, or None for a graph without one.
        heads: for each side what stands above its first lane, in two lines.
    """
    lanes = list(_lanes(trees))
    lane_of = {(side, path): number for number, (side, paths) in reversed([*enumerate(lanes)]) for path in paths}
    cells_of = [item for item in items if not item.mark]
    ways = [[_source(items, read) for read in item.inputs] for item in items]
    edges = (
        (items[s].key, item.key) for item, read in zip(items, ways, strict=True) if not item.mark for s, _ in read
    )
    rows = {key: place for place, key in enumerate(_ordered((item.key for item in cells_of), edges))}
    cells: list[Cell] = []
    at: dict[tuple[int, int], int] = {}
    wires: dict[tuple[int, int, str], list[int]] = {}
    for number, item in enumerate(items):
        if item.mark:
            continue
        own = lane_of[item.side, item.path]
        lane_read = {s: lane_of[item.side, items[s].path] for s, _ in ways[number]}
        for lane in sorted({own, *lane_read.values()}) if item.output else [own]:
            at[number, lane] = len(cells)
            head = f"{item.first} {lane - own}" if lane > own else item.first
            cells.append(
                Cell(
                    number,
                    rows[item.key],
                    lane,
                    _kind(item, lane > own),
                    head,
                    item.second,
                    item.rewired and lane == own,
                )
            )
    for number, item in enumerate(items):
        for source, chain in ways[number] if not item.mark else ():
            start = lane_of[item.side, items[source].path]
            end = start if item.output else lane_of[item.side, item.path]
            ends = at[source, start], at[number, end], ", ".join(items[each].mark for each in chain)
            wires.setdefault(ends, []).extend(each for each in chain if each not in wires.get(ends, ()))
    return Drawing(
        tuple(_titled(lanes, cells, heads)),
        tuple(_modules(cells_of, rows, len(trees))),
        tuple(tuple(_splits(tree, side, cells_of, rows)) for side, tree in enumerate(trees)),
        tuple(cells),
        tuple(Wire(*ends, tuple(inserted)) for ends, inserted in wires.items()),
    )


def _kind(item: Item, peer: bool) -> str:
    return "cloned" if peer and item.kind == "shared" else item.kind


def _lanes(trees: Sequence[HeadTree | None]) -> Iterator[tuple[int, list[Path]]]:
    """For each lane its side, and all branches of its head."""
    for side, tree in enumerate(trees):
        for full in tree.paths(tree.depth) if tree else [()]:
            yield side, [full[:level] for level in range(len(full) + 1)]


def _source(items: Sequence[Item], number: int) -> tuple[int, list[int]]:
    """What is read behind a number, and what was inserted on the way, from the value on."""
    chain: list[int] = []
    while items[number].mark:
        chain.insert(0, number)
        [number] = items[number].inputs[:1]
    return number, chain


def _ordered(keys: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Rows along the edges; of those that may come next, the first. What forms a circle stays together, as given."""
    graph = nx.DiGraph()
    graph.add_nodes_from(dict.fromkeys(keys))
    graph.add_edges_from(edges)
    place = {key: number for number, key in enumerate(graph)}
    circles = nx.condensation(graph)
    members = {circle: sorted(data["members"], key=place.__getitem__) for circle, data in circles.nodes(data=True)}
    order = nx.lexicographical_topological_sort(circles, key=lambda circle: place[members[circle][0]])
    return [key for circle in order for key in members[circle]]


def _titled(
    lanes: Sequence[tuple[int, list[Path]]], cells: Sequence[Cell], heads: Sequence[tuple[str, str]]
) -> Iterator[Lane]:
    """The lanes, once it is known what stands in them; those equal to the first from where they begin merge."""
    rows: list[set[int]] = [set() for _ in lanes]
    for cell in cells:
        rows[cell.lane].add(cell.row)
    first = 0
    for number, (side, _) in enumerate(lanes):
        if number == 0 or lanes[number - 1][0] != side:
            first = number
            yield Lane(*heads[side], side, False)
        else:
            begin = min(rows[number], default=0)
            yield Lane(
                f"head {number - first}", "", side, rows[number] == {row for row in rows[first] if row >= begin}
            )


def _modules(items: Sequence[Item], rows: dict[str, int], sides: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    found = [("", dict[int, int]()) for _ in rows]
    for item in items:
        module, levels = found[rows[item.key]]
        found[rows[item.key]] = module or item.module, levels | {item.side: len(item.path)}
    before = dict.fromkeys(range(sides), 0)
    for module, levels in found:
        before |= levels  # where a side has nothing in a row, its level goes on
        yield module, tuple(before.values())


def _splits(
    tree: HeadTree | None, side: int, items: Sequence[Item], rows: dict[str, int]
) -> Iterator[tuple[int, str, str]]:
    """The first row of every level below the trunk, with what is said of the split before it."""
    begins: dict[int, int] = {}
    for item in items:
        if item.side == side:
            begins[len(item.path)] = min(begins.get(len(item.path), len(rows)), rows[item.key])
    for level in range(1, tree.depth + 1 if tree else 0):
        if level in begins and tree:
            name = f"split at {tree.splits[level - 1]}" if tree.splits else "heads begin"
            yield begins[level], name, f"level {level}: {tree.branches(level)} branches"


def fraction(factor: float) -> str:
    """``1/2``, or a few digits."""
    parts = round(1 / factor) if factor else 0
    return f"1/{parts}" if parts and abs(factor * parts - 1) < 1e-9 else f"{factor:.3g}"
