"""The layout of the static picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import networkx as nx

from fxcollab.diffs.boxes import READABLE, Box, Item, boxes_of, fold, name_of, open_up_to, shown
from fxcollab.diffs.layered import Layout, Point, layered
from fxcollab.diffs.model import DiffData, DiffNode

TIMES = "\N{MULTIPLICATION SIGN}"
HEIGHT, MARGIN = 40.0, 8.0
_CHARACTER, _LEAST, _HEADER, _PADDING = 7.1, 100.0, 24.0, 12.0


@dataclass(frozen=True)
class Place:
    """A rectangle: its upper left corner and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Edge:
    """The line from a value's node to one that reads it.

    Attributes:
        points: the first and the last lie on it, it bends towards those between.
        added: whether the inference graph lacks it.
    """

    points: tuple[Point, ...]
    added: bool


@dataclass
class Picture:
    """What is drawn.

    Attributes:
        diff: of which it is a picture.
        width, height: of all, without the margin.
        boxes: the open ones, outer before inner.
        items: nodes and closed boxes.
        edges: between items.
    """

    diff: DiffData
    width: float
    height: float
    boxes: list[tuple[Box, Place]] = field(default_factory=list)
    items: list[tuple[Item, Place]] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height with the margin."""
        return self.width + 2 * MARGIN, self.height + 2 * MARGIN

    @property
    def title(self) -> str:
        """A description in one line."""
        diff = self.diff
        counts = f"{diff.count('cloned')} cloned, {diff.count('rescaled')} rescaled"
        return f"{diff.pattern}, {diff.tree.heads} heads: {counts}"

    def stack(self, item: Item) -> int:
        """How many instances a node behind a split stands for; 1 elsewhere."""
        return len(self.diff.instances[item.origin]) if isinstance(item, DiffNode) and item.change == "own" else 1


def picture_of(diff: DiffData) -> Picture:
    """The drawing of the page as it opens: modules and runs stay closed where there would be too much to read."""
    root = boxes_of(diff)
    if shown(root) > READABLE:
        fold(root)
        open_up_to(root, READABLE)
    return _Drawing(diff, root).picture()


def lines_of(item: Item) -> tuple[str, str]:
    """The two lines that stand in a node or a closed box."""
    if isinstance(item, Box):
        nodes = sum(1 for _ in item.nodes())
        return _clip(item.title), f"{nodes} {item.status or 'nodes'}"
    if item.factor is not None:
        return f"gradient {TIMES} {_fraction(item.factor)}", _clip(item.origin)
    name, shape = name_of(item), TIMES.join(map(str, item.shape or ()))
    return _clip(name), _clip("  ".join(filter(None, ("" if item.label == name else item.label, shape))), 40)


def change_of(item: Item) -> str:
    """A node's change; of a box that of its branch."""
    if not isinstance(item, Box):
        return item.change
    return "shared" if not item.path else "cloned" if any(item.path) else "own"


class _Drawing:
    """Sizes and layouts of boxes, from the inside out; places of all that is shown, from the outside in."""

    def __init__(self, diff: DiffData, root: Box) -> None:
        self._diff, self._root = diff, root
        ways = dict(_ways(root, ()))
        self._values = [_Value(ways[name], ways[node.name]) for node in diff.nodes for name in node.inputs]
        self._edges: dict[Box, list[tuple[Item, Item]]] = {}
        for value in self._values:
            self._edges.setdefault(value.box, []).append(value.children)
        self._layouts: dict[Box, Layout] = {}
        self._places: dict[int, Place] = {}

    def picture(self) -> Picture:
        width, height = self._size(self._root)
        picture = Picture(self._diff, width, height)
        self._put(self._root, Place(0.0, 0.0, width, height), picture)
        picture.edges.extend(dict.fromkeys(self._drawn_edges()))
        return picture

    def _size(self, item: Item) -> tuple[float, float]:
        if not (isinstance(item, Box) and item.open):
            return max(_LEAST, *(len(line) * _CHARACTER + 40 for line in lines_of(item))), HEIGHT
        layout, inner = self._layout(item), item is not self._root
        least, header = (len(item.title) * _CHARACTER + 40, _HEADER) if inner else (0.0, 0.0)
        return max(layout.width, least) + 2 * _PADDING, layout.height + header + 2 * _PADDING

    def _layout(self, box: Box) -> Layout:
        """Of a box's children, which are put in an order in which no edge goes back where there is one."""
        if box not in self._layouts:
            place = {id(child): number for number, child in enumerate(box.children)}
            edges = {(place[id(a)], place[id(b)]) for a, b in self._edges.get(box, ())}
            order = _along(len(box.children), edges)
            box.children[:] = [box.children[number] for number in order]
            at = {number: index for index, number in enumerate(order)}
            down = [(at[a], at[b]) for a, b in edges if at[a] < at[b]]
            self._layouts[box] = layered([self._size(child) for child in box.children], down)
        return self._layouts[box]

    def _put(self, item: Item, place: Place, picture: Picture) -> None:
        self._places[id(item)] = place
        if not (isinstance(item, Box) and item.open):
            picture.items.append((item, place))
            return
        header = 0.0
        if item is not self._root:
            picture.boxes.append((item, place))
            header = _HEADER
        layout = self._layout(item)
        left, top = place.x + (place.width - layout.width) / 2, place.y + _PADDING + header
        for child, (dx, dy) in zip(item.children, layout.corners, strict=True):
            self._put(child, Place(left + dx, top + dy, *self._size(child)), picture)

    def _drawn_edges(self) -> Iterator[Edge]:
        for value in self._values:
            start, end = map(_outermost_closed, value.ways)
            if start is not end:
                yield Edge(self._route(value, start, end), value.added)

    def _route(self, value: _Value, start: Item, end: Item) -> tuple[Point, ...]:
        """Along the layout's way where both stand in one box, else straight."""
        one, other = self._places[id(start)], self._places[id(end)]
        if value.children == (start, end):
            layout, number = self._layouts[value.box], value.box.children.index
            route, (x, y) = layout.routes.get((number(start), number(end))), layout.corners[number(start)]
            if route:
                return tuple((px + one.x - x, py + one.y - y) for px, py in route)
        first, last = (one.x + one.width / 2, one.y + one.height), (other.x + other.width / 2, other.y)
        return first, ((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), last


class _Value:
    """A value that one node makes and another one reads.

    Attributes:
        ways: for both nodes the boxes around them from the outside in, and themselves.
        box: the innermost box around both.
        children: which of its children they are, or are in.
        added: whether the inference graph lacks it.
    """

    def __init__(self, *ways: tuple[Item, ...]) -> None:
        self.ways = ways
        depth = next(depth for depth, (a, b) in enumerate(zip(*ways, strict=False)) if a is not b)
        box = ways[0][depth - 1]
        assert isinstance(box, Box)
        self.box, self.children = box, (ways[0][depth], ways[1][depth])
        self.added = any(isinstance(way[-1], DiffNode) and not way[-1].in_inference for way in ways)


def _ways(box: Box, around: tuple[Item, ...]) -> Iterator[tuple[str, tuple[Item, ...]]]:
    """For each node the boxes around it from the outside in, and itself."""
    way = (*around, box)
    for child in box.children:
        if isinstance(child, Box):
            yield from _ways(child, way)
        else:
            yield child.name, (*way, child)


def _outermost_closed(way: Sequence[Item]) -> Item:
    """What is drawn of a node: the outermost closed box around it, or the node itself."""
    return next((item for item in way if isinstance(item, Box) and not item.open), way[-1])


def _along(count: int, edges: set[tuple[int, int]]) -> list[int]:
    """An order along the edges; of those that may come first, the first. A module called twice may close a cycle."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(edges)
    cycles = nx.condensation(graph)
    members = {cycle: sorted(data["members"]) for cycle, data in cycles.nodes(data=True)}
    order = nx.lexicographical_topological_sort(cycles, key=lambda cycle: members[cycle][0])
    return [number for cycle in order for number in members[cycle]]


def _clip(text: str, most: int = 36) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _fraction(factor: float) -> str:
    parts = round(1 / factor)
    return f"1/{parts}" if abs(factor * parts - 1) < 1e-9 else f"{factor:.3g}"
