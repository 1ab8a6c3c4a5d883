"""The layout that picture, page and notebook share: which rows fold into one, and in which track a value runs down.

Every row stays a row whatever is folded, so what is computed here once holds for any drawing of the scene.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile

from fxcollab.diffs.scene import Scene

LEAST, MOST = 4, 12
"""Neighbours that may fold into one row: at least so many, and with more they fold in several steps."""

DOTS = " \N{HORIZONTAL ELLIPSIS} "


@dataclass(frozen=True)
class Group:
    """Rows from ``start`` to the one before ``stop`` that can stand as one: a module's, or neighbours."""

    title: str
    start: int
    stop: int
    children: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How a scene is laid out.

    Attributes:
        scene: what.
        groups: the outermost.
        tracks: for each wire the track beside a lane in which it runs past other rows, the same for all from one row
            with one mark; None where it has no need of it.
    """

    scene: Scene
    groups: tuple[Group, ...]
    tracks: tuple[int | None, ...]

    def visible(self, depth: int) -> list[tuple[int, int, Group | None]]:
        """What stands as a row if groups are open to a depth: rows, from the first to the one before the last."""
        return list(_visible(self.groups, 0, len(self.scene.drawing.modules), depth))

    def depth_for(self, rows: int) -> int:
        """How deep groups may be open, all of a depth or none, for at most so many rows to be seen."""
        depth, now, deeper = 0, len(self.visible(0)), len(self.visible(1))
        while now < deeper <= rows:
            depth, now, deeper = depth + 1, deeper, len(self.visible(depth + 2))
        return depth


def laid_out(scene: Scene) -> Layout:
    """The layout of a scene."""
    return Layout(scene, tuple(_kept(_Grouping(scene).outermost())), _tracks(scene))


class _Grouping:
    """Makes groups; a single row is one by itself until all are made."""

    def __init__(self, scene: Scene) -> None:
        self._level = [level for _, level in scene.drawing.modules]
        self._atoms = [module.split(".") if module else [] for module, _ in scene.drawing.modules]
        self._names = {cell.row: cell.first for cell in reversed(scene.drawing.cells)}
        reads = {scene.drawing.cells[wire.target].row for wire in scene.drawing.wires}
        read = {scene.drawing.cells[wire.source].row for wire in scene.drawing.wires}
        self._ends = set(range(len(self._level))) - (reads & read)

    def outermost(self) -> list[Group]:
        """Of each level one, where it is of more than a few; a few inputs and the output stand by themselves."""
        found: list[Group] = []
        for _, run in groupby(self._modules(0, len(self._level), 0), key=lambda item: self._level[item.start]):
            level = list(run)
            first = min(LEAST, sum(1 for _ in takewhile(self._is_end, level)))
            last = len(level) - sum(1 for _ in takewhile(self._is_end, reversed(level[first:])))
            inner = self._few(level[first:last])
            found += [*level[:first], *([self._run(inner)] if len(inner) >= LEAST else inner), *level[last:]]
        return found

    def _is_end(self, item: Group) -> bool:
        return item.stop - item.start == 1 and item.start in self._ends

    def _modules(self, start: int, stop: int, depth: int) -> list[Group]:
        """What is in the forward of one module below ``depth``, and on one level, in one."""

        def place(row: int) -> tuple[object, ...]:
            return self._level[row], self._atoms[row][depth] if len(self._atoms[row]) > depth else row

        found = []
        for _, run in groupby(range(start, stop), key=place):
            rows = list(run)
            title, inner = self._names[rows[0]], list[Group]()
            if len(rows) > 1:
                title, inner = self._atoms[rows[0]][depth], self._modules(rows[0], rows[-1] + 1, depth + 1)
            if len(inner) == 1:  # it holds nothing but one more
                title, inner = f"{title}.{inner[0].title}", list(inner[0].children)
            found.append(Group(title, rows[0], rows[-1] + 1, tuple(self._few(inner))))
        return found

    def _few(self, items: list[Group]) -> list[Group]:
        """No more than `MOST` side by side: else runs of them fold, and runs of runs."""
        while len(items) > MOST:
            size = max(LEAST, min(MOST, round(len(items) ** 0.5)))
            items = [self._run(items[at : at + size]) for at in range(0, len(items), size)]
        return items

    def _run(self, items: Sequence[Group]) -> Group:
        if len(items) == 1:
            return items[0]
        title = f"{items[0].title.partition(DOTS)[0]}{DOTS}{items[-1].title.rpartition(DOTS)[2]}"
        return Group(title, items[0].start, items[-1].stop, tuple(items))


def _kept(groups: Sequence[Group]) -> Iterator[Group]:
    """Without single rows."""
    return (replace(group, children=tuple(_kept(group.children))) for group in groups if group.stop - group.start > 1)


def _visible(groups: Sequence[Group], start: int, stop: int, depth: int) -> Iterator[tuple[int, int, Group | None]]:
    for group in groups:
        yield from ((row, row + 1, None) for row in range(start, group.start))
        if depth > 0:
            yield from _visible(group.children, group.start, group.stop, depth - 1)
        else:
            yield group.start, group.stop, group
        start = group.stop
    yield from ((row, row + 1, None) for row in range(start, stop))


def _tracks(scene: Scene) -> tuple[int | None, ...]:
    """Ways that overlap have tracks of their own; the shortest run nearest to the nodes."""
    ways: dict[tuple[int, str], list[int]] = {}
    for wire in scene.drawing.wires:
        source, target = scene.drawing.cells[wire.source].row, scene.drawing.cells[wire.target].row
        if target - source != 1:
            ways.setdefault((source, wire.mark), [source]).append(target)
    lengths = sorted((max(rows) - min(rows), min(rows), way) for way, rows in ways.items())
    taken: list[list[tuple[int, int]]] = []  # of each track, the ways in it in their order
    found: dict[tuple[int, str], int] = {}
    for length, start, way in lengths:
        for number, track in enumerate([*taken, []]):
            at = bisect(track, (start, start))
            free_before = at == 0 or track[at - 1][1] <= start
            if free_before and (at == len(track) or track[at][0] >= start + length):
                if number == len(taken):
                    taken.append(track)
                track.insert(at, (start, start + length))
                found[way] = number
                break
    return tuple(found.get((scene.drawing.cells[wire.source].row, wire.mark)) for wire in scene.drawing.wires)
