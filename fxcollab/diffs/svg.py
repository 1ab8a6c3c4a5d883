"""The difference as a static picture, made without a browser."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from fxcollab.diffs.boxes import Box, Item
from fxcollab.diffs.layered import Point
from fxcollab.diffs.model import GENERATOR, DiffData
from fxcollab.diffs.picture import MARGIN, TIMES, Edge, Picture, Place, change_of, lines_of, picture_of
from fxcollab.diffs.resources import read


def to_svg(diff: DiffData) -> str:
    """The drawing of the page as it opens: branches as boxes, modules closed where there would be too much to read.

    Colours follow the reader's light or dark scheme. The same bytes for the same graphs.
    """
    return draw(picture_of(diff), read("colours.css") + read("drawing.css"))


def draw(picture: Picture, style: str) -> str:
    """A picture as SVG.

    Args:
        picture: what is drawn, and where.
        style: its style sheet.
    """
    width, height = picture.size
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-MARGIN:g} {-MARGIN:g} {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img" aria-label="{_escaped(picture.title)}">',
            f"<!-- {GENERATOR} -->",
            f"<title>{_escaped(picture.title)}</title>",
            f"<style>{style}</style>",
            _MARKER,
            f'<rect id="page" x="{-MARGIN:g}" y="{-MARGIN:g}" width="100%" height="100%"/>',
            '<g id="world">',
            *(_box(box, place) for box, place in picture.boxes),
            *dict.fromkeys(map(_edge, picture.edges)),
            *(_title(box, place) for box, place in picture.boxes),
            *(_item(item, place, picture.stack(item)) for item, place in picture.items),
            "</g>",
            "</svg>\n",
        ]
    )


_MARKER = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0,0L8,4L0,8z"/></marker></defs>'
)


def _box(box: Box, place: Place) -> str:
    kind = "branch" if box.kind == "branch" else "module"
    return f'<g class="box {kind} {change_of(box)}">{_rect(place, 8)}</g>'


def _title(box: Box, place: Place) -> str:
    """Above the edges, so that none runs through it."""
    return f'<text class="title" x="{place.x + 10:g}" y="{place.y + 16:g}">{_escaped(box.title)}</text>'


def _item(item: Item, place: Place, stack: int) -> str:
    first, second = map(_escaped, lines_of(item))
    middle = place.x + place.width / 2
    glyph = "" if isinstance(item, Box) else item.glyph
    many = f'<text class="stack" x="{place.x + place.width - 6:g}" y="{place.y + 13:g}">{TIMES}{stack}</text>'
    return (
        f'<g class="{"closed" if isinstance(item, Box) else "node"} {change_of(item)}">{_rect(place, 7)}'
        f'<text class="first" x="{middle:g}" y="{place.y + (17 if second else 24):g}">{first}</text>'
        f'<text class="second" x="{middle:g}" y="{place.y + 32:g}">{second}</text>'
        f'<text class="glyph" x="{place.x + 7:g}" y="{place.y + 13:g}">{glyph}</text>{many * (stack > 1)}</g>'
    )


def _edge(edge: Edge) -> str:
    kind = "added" if edge.added else "kept"
    return f'<g class="edge {kind}"><path d="{"".join(_curve(edge.points))}" marker-end="url(#arrow)"/></g>'


def _escaped(text: str) -> str:
    """As XML takes it, which knows no control characters."""
    return html.escape("".join(c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in text))


def _rect(place: Place, radius: int) -> str:
    return f'<rect x="{place.x:g}" y="{place.y:g}" width="{place.width:g}" height="{place.height:g}" rx="{radius}"/>'


def _curve(points: Sequence[Point]) -> Iterator[str]:
    (x, y), *between, (a, b) = points
    yield f"M{x:g},{y:g}"
    for number, (cx, cy) in enumerate(between, start=1):
        nx, ny = points[number + 1]
        last = number == len(between)
        ex, ey = (nx, ny) if last else ((cx + nx) / 2, (cy + ny) / 2)
        yield f"Q{cx:g},{cy:g} {ex:g},{ey:g}"
    if not between:
        yield f"L{a:g},{b:g}"
