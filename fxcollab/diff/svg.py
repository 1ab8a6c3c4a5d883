"""The difference as a static picture, made without a browser."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib.resources import files

from fxcollab.diff.boxes import Box, boxes_of
from fxcollab.diff.layered import Layout, Point, layered
from fxcollab.diff.model import Diff, DiffNode

_HEIGHT, _CHARACTER, _LEAST, _HEADER, _PADDING = 40.0, 7.1, 100.0, 24.0, 12.0
_Item = Box | DiffNode
TIMES = "\N{MULTIPLICATION SIGN}"


def to_svg(diff: Diff) -> str:
    """The drawing of the page as it opens: branches as boxes, modules closed where there would be too much to read.

    Colours follow the reader's light or dark scheme. The same bytes for the same graphs.
    """
    drawing = _Drawing(diff)
    width, height = drawing.size(drawing.root)
    style = "".join(files("fxcollab.diff").joinpath("page", name).read_text("utf-8") for name in _STYLES)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {width + 16:g} {height + 16:g}" '
        f'width="{width + 16:g}" height="{height + 16:g}" role="img" aria-label="{html.escape(_title(diff))}">\n'
        f"<title>{html.escape(_title(diff))}</title>\n<style>{style}</style>\n{_MARKER}\n"
        f'<rect x="-8" y="-8" width="100%" height="100%" fill="var(--page)"/>\n<g id="world">\n'
        + "\n".join(drawing.elements())
        + "\n</g>\n</svg>\n"
    )


_STYLES = ("colours.css", "drawing.css")
_MARKER = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0,0L8,4L0,8z"/></marker></defs>'
)


def _title(diff: Diff) -> str:
    return (
        f"{diff.pattern}, {diff.tree.heads} heads: {diff.count('cloned')} cloned, {diff.count('rescaled')} rescaled"
    )


class _Drawing:
    """Sizes and layouts of boxes, from the inside out; places of all that is shown, from the outside in."""

    def __init__(self, diff: Diff) -> None:
        self.root = boxes_of(diff)
        self._diff = diff
        self._around: dict[str, list[Box]] = {}
        self._note_boxes(self.root, [])
        self._layouts: dict[Box, Layout] = {}
        self._places: dict[int, tuple[float, float, float, float]] = {}

    def _note_boxes(self, box: Box, around: list[Box]) -> None:
        for child in box.children:
            if isinstance(child, Box):
                self._note_boxes(child, [*around, box])
            else:
                self._around[child.name] = [*around, box]

    def size(self, item: _Item) -> tuple[float, float]:
        """Width and height."""
        if isinstance(item, Box) and item.open:
            layout = self._layout(item)
            least = len(item.title) * _CHARACTER + 40 if item.parent else 0.0
            header = _HEADER if item.parent else 0.0
            return max(layout.width, least) + 2 * _PADDING, layout.height + header + 2 * _PADDING
        return max(_LEAST, *(len(line) * _CHARACTER + 40 for line in _lines(item))), _HEIGHT

    def _layout(self, box: Box) -> Layout:
        if box not in self._layouts:
            numbers = {id(child): number for number, child in enumerate(box.children)}
            pairs = (self._children_of(box, *edge) for edge in self._edges())
            edges = [
                (numbers[id(a)], numbers[id(b)]) for a, b in pairs if a is not None and b is not None and a is not b
            ]
            order = _topological(len(numbers), edges)
            place = {number: index for index, number in enumerate(order)}
            found = layered(
                [self.size(box.children[number]) for number in order], [(place[a], place[b]) for a, b in edges]
            )
            box.children[:] = [box.children[number] for number in order]
            self._layouts[box] = found
        return self._layouts[box]

    def _edges(self) -> Iterator[tuple[DiffNode, DiffNode]]:
        for node in self._diff.nodes:
            for name in node.inputs:
                yield self._diff.by_name[name], node

    def _children_of(self, box: Box, *ends: DiffNode) -> list[_Item | None]:
        """Which of the box's own children each end lies in."""
        return [self._child_of(box, end) for end in ends]

    def _child_of(self, box: Box, node: DiffNode) -> _Item | None:
        around = self._around[node.name]
        if box not in around:
            return None
        deeper = around[around.index(box) + 1 :]
        return deeper[0] if deeper else node

    def _shown(self, node: DiffNode) -> _Item:
        """The outermost closed box around a node, or the node itself."""
        return next((box for box in self._around[node.name] if not box.open), node)

    def elements(self) -> Iterator[str]:
        """Boxes, then edges, then nodes."""
        boxes: list[str] = []
        nodes: list[str] = []
        width, height = self.size(self.root)
        self._place(self.root, (0.0, 0.0, width, height), boxes, nodes)
        yield from boxes
        yield from dict.fromkeys(self._drawn_edges())
        yield from nodes

    def _place(
        self, item: _Item, place: tuple[float, float, float, float], boxes: list[str], nodes: list[str]
    ) -> None:
        self._places[id(item)] = place
        x, y, width, _ = place
        if not (isinstance(item, Box) and item.open):
            nodes.append(_node(item, place, self._diff))
            return
        if item.parent:
            boxes.append(_box(item, place))
        layout = self._layout(item)
        left = x + (width - layout.width) / 2
        top = y + _PADDING + (_HEADER if item.parent else 0.0)
        for child, (dx, dy) in zip(item.children, layout.corners, strict=True):
            self._place(child, (left + dx, top + dy, *self.size(child)), boxes, nodes)

    def _drawn_edges(self) -> Iterator[str]:
        for source, target in self._edges():
            start, end = self._shown(source), self._shown(target)
            if start is end:
                continue
            added = not (source.in_inference and target.in_inference)
            path = _curve(self._route(start, end))
            kind = "added" if added else "kept"
            yield f'<g class="edge {kind}"><path d="{path}" marker-end="url(#arrow)"/></g>'

    def _route(self, start: _Item, end: _Item) -> list[Point]:
        (x, y, width, height), (a, b, wide, _) = self._places[id(start)], self._places[id(end)]
        for box, layout in self._layouts.items():
            if any(start is child for child in box.children) and any(end is child for child in box.children):
                own = {id(child): number for number, child in enumerate(box.children)}
                route = layout.routes.get((own[id(start)], own[id(end)]))
                if route:
                    corner = layout.corners[own[id(start)]]
                    return [(px + x - corner[0], py + y - corner[1]) for px, py in route]
        first, last = (x + width / 2, y + height), (a + wide / 2, b)
        return [first, ((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), last]


def _topological(count: int, edges: list[tuple[int, int]]) -> list[int]:
    """Children in an order in which no edge goes back; of those that may come first, the first."""
    waiting = {number: {a for a, b in edges if b == number} for number in range(count)}
    order: list[int] = []
    while waiting:
        ready = next(number for number, sources in waiting.items() if not sources & waiting.keys())
        order.append(ready)
        del waiting[ready]
    return order


def _lines(item: _Item) -> tuple[str, str]:
    if isinstance(item, Box):
        nodes = list(item.nodes())
        return _clip(item.title), f"{len(nodes)} nodes"
    if item.factor is not None:
        return f"gradient {TIMES} {_fraction(item.factor)}", _clip(item.origin)
    inside = item.op == "call_module" and item.module and item.target.startswith(f"{item.module}.")
    name = item.target[len(item.module) + 1 :] if inside else item.counterpart or f"{item.change}: {item.origin}"
    shape = TIMES.join(map(str, item.shape or ()))
    return _clip(name), _clip("  ".join(filter(None, ("" if item.label == name else item.label, shape))), 40)


def _clip(text: str, most: int = 36) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _fraction(factor: float) -> str:
    parts = round(1 / factor)
    return f"1/{parts}" if abs(factor * parts - 1) < 1e-9 else f"{factor:.3g}"


def _change(item: _Item) -> str:
    if not isinstance(item, Box):
        return item.change
    return "shared" if not item.path else "cloned" if any(item.path) else "own"


def _box(box: Box, place: tuple[float, float, float, float]) -> str:
    x, y, *_ = place
    kind = "branch" if box.module is None else "module"
    return (
        f'<g class="box {kind} {_change(box)}">{_rect(place, 8)}'
        f'<text x="{x + 10:g}" y="{y + 16:g}">{html.escape(box.title)}</text></g>'
    )


def _node(item: _Item, place: tuple[float, float, float, float], diff: Diff) -> str:
    x, y, width, _ = place
    first, second = map(html.escape, _lines(item))
    middle = x + width / 2
    glyph = "" if isinstance(item, Box) else item.glyph
    count = len(diff.instances[item.origin]) if isinstance(item, DiffNode) and item.change == "own" else 1
    stack = f'<text class="stack" x="{x + width - 6:g}" y="{y + 13:g}">{TIMES}{count}</text>' if count > 1 else ""
    return (
        f'<g class="{"closed" if isinstance(item, Box) else "node"} {_change(item)}">{_rect(place, 7)}'
        f'<text class="first" x="{middle:g}" y="{y + (17 if second else 24):g}">{first}</text>'
        f'<text class="second" x="{middle:g}" y="{y + 32:g}">{second}</text>'
        f'<text class="glyph" x="{x + 7:g}" y="{y + 13:g}">{glyph}</text>{stack}</g>'
    )


def _rect(place: tuple[float, float, float, float], radius: int) -> str:
    x, y, width, height = place
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>'


def _curve(points: list[Point]) -> str:
    (x, y), *rest = points
    if len(rest) == 1:
        return f"M{x:g},{y:g}L{rest[0][0]:g},{rest[0][1]:g}"
    path = f"M{x:g},{y:g}"
    for place, (cx, cy) in enumerate(rest[:-1]):
        nx, ny = rest[place + 1]
        last = place == len(rest) - 2
        end = (nx, ny) if last else ((cx + nx) / 2, (cy + ny) / 2)
        path += f"Q{cx:g},{cy:g} {end[0]:g},{end[1]:g}"
    return path
