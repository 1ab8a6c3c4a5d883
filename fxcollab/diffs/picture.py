"""Where everything stands, for what is open. The page's ``draw.js`` does the same with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fxcollab.diffs.layout import Group, Layout
from fxcollab.diffs.scene import Cell, Lane

METRICS = {
    "width": 184, "narrow": 124, "height": 32, "between": 14, "mark": 20, "split": 38, "axis": 136, "narrowAxis": 96,
    "track": 9, "tracks": 60, "edge": 14, "apart": 12, "sides": 28, "top": 40, "character": 7.4, "label": 14,
}  # fmt: skip
"""Sizes in units of the drawing; ``character`` is the width of a letter of the first line in a cell."""
MARGIN = 14.0
Spot = tuple[int, int]
"""Where a cell stands: a visible row, and a column."""


@dataclass(frozen=True)
class Line:
    """A drawn way of values: from one spot to another."""

    source: Spot
    target: Spot
    kind: str
    path: str


class Picture:
    """A drawing of a layout.

    Args:
        layout: of what.
        depth: how deep groups are open.
        merged: whether lanes equal to the first of their side are drawn once.
    """

    def __init__(self, layout: Layout, depth: int, merged: bool) -> None:
        m = METRICS
        self.scene, self.layout = layout.scene, layout
        self.rows = layout.visible(depth)
        self._row = [v for v, (start, stop, _) in enumerate(self.rows) for _ in range(start, stop)]
        self.columns = list(_columns(self.scene.drawing.lanes, merged))
        column = {lane: c for c, lanes in enumerate(self.columns) for lane in lanes}
        self.spots: dict[Spot, list[Cell]] = {}
        self._spot: list[Spot] = []
        for cell in self.scene.drawing.cells:
            self._spot.append((self._row[cell.row], column[cell.lane]))
            self.spots.setdefault(self._spot[-1], []).append(cell)
        self.begins = [
            min((v for v, c in self.spots if c == column), default=0) for column in range(len(self.columns))
        ]
        self._wires: dict[tuple[Spot, Spot, str], int] = {}
        self.mark_kinds: dict[tuple[Spot, str], str] = {}
        for wire, track in zip(self.scene.drawing.wires, layout.tracks, strict=True):
            source, target = self._spot[wire.source], self._spot[wire.target]
            if source != target:
                key = source, target, wire.mark
                for node in wire.inserted[:1]:
                    self.mark_kinds[source, wire.mark] = self.scene.nodes[node][1]
                self._wires[key] = min(self._wires.get(key, 1 << 30), 1 << 30 if track is None else track)
        used = sorted({t for (s, e, _), t in self._wires.items() if t < 1 << 30 and not self._is_direct(s, e)})
        step = min(m["track"], m["tracks"] / max(len(used), 1))
        self._track = {track: m["edge"] + number * step for number, track in enumerate(used)}
        self.gutter = m["edge"] + len(used) * step
        self.ports = self._made_ports()
        self.tops, self.height = self._made_tops()
        self.lefts, self.axes, self.width = self._made_lefts()

    @cached_property
    def folds(self) -> list[tuple[int, int, int, str]]:
        """Open groups: the first and last of their visible rows, how deep they are in others, their titles."""
        shown = {(group.start, group.stop) for _, _, group in self.rows if group}

        def inside(groups: tuple[Group, ...], depth: int) -> Iterator[tuple[int, int, int, str]]:
            for group in groups:
                if (group.start, group.stop) not in shown:
                    yield self._row[group.start], self._row[group.stop - 1], depth, group.title
                    yield from inside(group.children, depth + 1)

        return list(inside(self.layout.groups, 0))

    def _is_direct(self, source: Spot, target: Spot) -> bool:
        """Whether a value can go straight down the target's lane."""
        (s, _), (t, column) = source, target
        header = self.begins[column] - 1 if source[1] != column else -1
        return t > s and not any((v, column) in self.spots or v == header for v in range(s + 1, t))

    def _made_ports(self) -> dict[Spot, list[tuple[int, str]]]:
        """For each spot the marks below it with their places, 0 in the middle: there is what goes straight down."""
        straight: dict[Spot, str] = {}
        marks: dict[Spot, list[str]] = {}
        for source, target, mark in self._wires:
            if source[1] == target[1] and self._is_direct(source, target):
                straight[source] = mark
            if mark or source[1] != target[1]:
                marks.setdefault(source, [])
                marks[source] += [mark] * (mark not in marks[source])
        found = {}
        for spot, named in marks.items():
            first = straight.get(spot)
            rest = [mark for mark in named if mark != first]
            places = [(0, first)] if first in named else []
            found[spot] = [*places, *enumerate(rest, 0 if first is None else 1)]
        return found

    def _made_tops(self) -> tuple[list[float], float]:
        m, tops, y = METRICS, list[float](), float(METRICS["top"])
        splits = {self._row[row] for side in self.scene.drawing.splits for row, _, _ in side}
        for v in range(len(self.rows)):
            y += m["label"] * max(0, sum(first == v for first, *_ in self.folds) - 2)
            tops.append(y)
            marks = max((len(ports) for (row, _), ports in self.ports.items() if row == v), default=0)
            y += m["height"] + max(m["between"] + m["mark"] * marks, m["split"] if v + 1 in splits else 0)
        return tops, y

    def _made_lefts(self) -> tuple[list[float], list[float], float]:
        """The left edge of every column's cells, of every side's axis, and the right end."""
        m, x, lefts, axes = METRICS, 0.0, list[float](), list[float]()
        for lanes in self.columns:
            side = self.scene.drawing.lanes[lanes[0]].side
            if side == len(axes):
                x += m["sides"] * bool(axes)
                axes.append(x)
                x += m["axis"] if side == 0 or self.scene.drawing.splits[side] else 0
            lefts.append(x + self.gutter)
            x = lefts[-1] + m["width"] + m["apart"]
        return lefts, axes, x

    def row(self, row: int) -> int:
        """Where a row of the scene is seen."""
        return self._row[row]

    def bottom(self, v: int) -> float:
        """Of the cells in a row."""
        return self.tops[v] + METRICS["height"]

    def port(self, spot: Spot, place: int) -> tuple[float, float]:
        """The middle of a mark below a cell: the first lowest, so that what leaves it meets no other."""
        m = METRICS
        aside = (place + 1) // 2 * (1 if place % 2 else -1) * max(46.0, m["width"] * 0.34)
        limit = m["width"] / 2 - 16
        last = max(place for place, _ in self.ports[spot])
        y = self.bottom(spot[0]) + 4 + m["mark"] * (last - place + 0.5)
        return self.lefts[spot[1]] + m["width"] / 2 + max(-limit, min(limit, aside)), y

    def lines(self) -> Iterator[Line]:
        """All ways, with arrows at their ends."""
        entries: dict[Spot, int] = {}
        for (source, target, mark), track in self._wires.items():
            kinds = {cell.kind for spot in (source, target) for cell in self.spots[spot]}
            kind = "kept" if kinds <= KEPT else self.spots[target][0].kind
            yield Line(source, target, kind, self._path(source, target, mark, track, entries))

    def _path(self, source: Spot, target: Spot, mark: str, track: int, entries: dict[Spot, int]) -> str:
        middle = METRICS["width"] / 2
        left, top = self.lefts[target[1]], self.tops[target[0]]
        crosses, direct = source[1] != target[1], self._is_direct(source, target)
        if mark or crosses:
            place = next(place for place, name in self.ports[source] if name == mark)
            x, y = self.port(source, place)
            start = f"M{x:g},{self.bottom(source[0]):g}V{y:g}"
        else:
            x, y = self.lefts[source[1]], self.bottom(source[0]) - 8
            start = f"M{x + middle:g},{y + 8:g}" if direct else f"M{x:g},{y:g}"
        if direct and not (crosses and (source[0], target[1]) in self.spots):
            return f"{start}{f'H{left + middle:g}' if mark or crosses else ''}V{top:g}"
        way = left - 6 if direct else left - self._track[track]
        entry = top + 7 + 6 * min(entries.get(target, 0), 3)
        entries[target] = entries.get(target, 0) + 1
        return f"{start}H{way:g}V{entry:g}H{left:g}"


KEPT = {"shared", "own", "same", "changed", "rewired"}
"""Kinds of cells whose ways are no additions."""


def _columns(lanes: tuple[Lane, ...], merged: bool) -> Iterator[list[int]]:
    """The lanes of every column: one, or all of a side that are equal to its first."""
    alike: dict[int, list[int]] = {}
    for number, lane in enumerate(lanes):
        if merged and lane.merges and lane.side in alike:
            alike[lane.side].append(number)
            continue
        column = [number]
        if lane.merges:
            alike[lane.side] = column
        yield column  # grows while later lanes join it
