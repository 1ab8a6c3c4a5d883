"""A scene as a static picture, made without a browser."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from importlib.resources import files

from fxcollab.diffs.layout import Group, laid_out
from fxcollab.diffs.model import short
from fxcollab.diffs.picture import MARGIN, METRICS, Picture, Spot
from fxcollab.diffs.scene import TIMES, Cell, Scene
from fxcollab.io.mark import marked_markup

READABLE, LANES = 34, 5
"""How many rows are drawn before modules fold, and how many lanes before equal ones are drawn once."""
_LINE, _HEAD = 17, 22.0
Size = tuple[float, float]


def read(name: str) -> str:
    """The text of a file in the folder ``page``, of which page and pictures are made."""
    return files("fxcollab.diffs").joinpath("page", name).read_text(encoding="utf-8")


def to_svg(scene: Scene) -> str:
    """The drawing of the page: a lane a head, rows folded where there would be too many to read.

    Colours follow the reader's light or dark scheme. The same bytes for the same graphs.
    """
    return marked_markup(drawn(scene, read("drawing.css"))[0])


def drawn(scene: Scene, style: str) -> tuple[str, Size]:
    """A scene as SVG with a style sheet, and its size."""
    layout = laid_out(scene)
    picture = Picture(layout, layout.depth_for(READABLE), len(scene.drawing.lanes) > LANES * len(scene.sides))
    width = max(picture.width, 420.0)
    facts = textwrap.wrap(scene.facts, int(width / 6.6)) or [""]
    legend = list(_legend(scene, width))
    top = _HEAD + _LINE * len(facts)
    height = top + picture.height + _LINE * (1 + (legend[-1][1] if legend else 0))
    size = width + 2 * MARGIN, height + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-MARGIN:g} {-MARGIN:g} {size[0]:g} {size[1]:g}" '
        f'width="{size[0]:g}" height="{size[1]:g}" role="img" '
        f'aria-label="{_escaped(scene.title)}. {_escaped(scene.facts)}">',
        f"<title>{_escaped(scene.title)}</title>",
        f"<style>{style}</style>",
        DEFINITIONS,
        f'<rect id="page" x="{-MARGIN:g}" y="{-MARGIN:g}" width="100%" height="100%"/>',
        '<g class="art">',
        _text("name", 0, 12, scene.title),
        *(_text("note", 0, _HEAD + 10 + _LINE * n, line) for n, line in enumerate(facts)),
        f'<g transform="translate(0,{top:g})">',
        *_lanes(picture),
        *_axes(picture),
        *dict.fromkeys(
            f'<g class="edge {w.kind}"><path d="{w.path}" marker-end="url(#arrow)"/></g>' for w in picture.lines()
        ),
        *_marks(picture),
        *(_cell(picture, spot, cells) for spot, cells in picture.spots.items()),
        "</g>",
        *(_key(x, top + picture.height + _LINE * line, *key) for x, line, key in legend),
        "</g>",
        "</svg>\n",
    ]
    return "\n".join(parts), size


DEFINITIONS = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
    'markerUnits="userSpaceOnUse" orient="auto">'
    '<path d="M0,0L8,4L0,8z"/></marker>'
    '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="7" height="7"/><path d="M0,0V7"/></pattern></defs>'
)


def _lanes(picture: Picture) -> Iterator[str]:
    """The ground of every lane from where it begins, and what stands above it."""
    m = METRICS
    for c, lanes in enumerate(picture.columns):
        lane, begin, x = picture.scene.drawing.lanes[lanes[0]], picture.begins[c], picture.lefts[c]
        first = c == 0 or picture.scene.drawing.lanes[picture.columns[c - 1][0]].side != lane.side
        last = max((v for v, column in picture.spots if column == c), default=begin)
        y = picture.tops[begin]
        yield (
            f'<rect class="lane {"first" if first else "peer"}" x="{x - picture.gutter + 4:g}" y="{y - 7:g}" '
            f'width="{picture.gutter + m["width"] + 2:g}" height="{picture.bottom(last) - y + 14:g}" rx="8"/>'
        )
        title, note = lane.title, lane.note
        if len(lanes) > 1:
            title, note = (
                f"{title} to {picture.scene.drawing.lanes[lanes[-1]].title.rpartition(' ')[2]}",
                f"{TIMES} {len(lanes)} like head 0",
            )
        above = picture.tops[begin - 1] if begin and not first else picture.tops[0] - m["height"] - 8
        for n, (kind, line) in enumerate(
            (("head", title), ("note", note or ("" if first else "for training only, own weights")))
        ):
            yield _text(kind, x + 4, above + 13 + 14 * n, line)


def _axes(picture: Picture) -> Iterator[str]:
    """Where the splits are, and which modules are open."""
    for side, splits in enumerate(picture.scene.drawing.splits):
        end = max(
            x for c, x in enumerate(picture.lefts) if picture.scene.drawing.lanes[picture.columns[c][0]].side == side
        )
        x = picture.axes[side]
        if side == 0 and splits:
            yield _text("level", x, picture.tops[0] - 14, "trunk, shared")
        for row, title, note in splits:
            v = picture.row(row)
            y = picture.tops[v] - 7
            yield f'<path class="split" d="M{x:g},{y:g}H{end + METRICS["width"]:g}"/>'
            yield _text("cut", x, y - 18, _clip(title, 19)) + _text("level", x, y - 5, note)
    for first, last, depth, title in picture.folds:
        above = sum(1 for other, _, inside, _ in picture.folds if other == first and inside > depth)
        x, y = 4 + 7 * depth, picture.bottom(first) - 12 - METRICS["label"] * above
        yield f'<path class="fold" d="M{x:g},{y + 4:g}V{picture.bottom(last):g}h4"/>'
        yield _text("fold", x + 6, y, _clip(title, 17 - depth))


def _marks(picture: Picture) -> Iterator[str]:
    for spot, ports in picture.ports.items():
        for place, mark in ports:
            if mark:
                x, y = picture.port(spot, place)
                wide = 7.2 * len(mark) + 12
                yield (
                    f'<g class="mark {picture.mark_kinds[spot, mark]}">'
                    f'<rect x="{x - wide / 2:g}" y="{y - 8:g}" width="{wide:g}" height="16" rx="8"/>'
                    f'<text x="{x:g}" y="{y + 4:g}">{_escaped(mark)}</text></g>'
                )


def _cell(picture: Picture, spot: Spot, cells: Sequence[Cell]) -> str:
    m, (v, c) = METRICS, spot
    group = picture.rows[v][2]
    x, y, width = picture.lefts[c], picture.tops[v], m["width"]
    many = len({cell.lane for cell in cells})
    first, second = lines(group, cells, picture)
    kind = next((cell.kind for cell in cells if cell.kind != "same"), "same")
    rewired = kind != "rewired" and any(cell.rewired for cell in cells)
    signs = {key.kind: key.sign for key in picture.scene.legend}
    first = _clip(first, int((width - 30 - 22 * (many > 1)) / m["character"]))
    return (
        f'<g class="node {kind}{" closed" if group else ""}{" rewired" if rewired else ""}">'
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{m["height"]:g}" rx="{3 if group else 6}"/>'
        + _text("first", x + 24, y + (14 if second else 20), first)
        + (_text("second", x + 24, y + 27, _clip(second, int((width - 28) / 7.3))) if second else "")
        + _text("sign", x + 5, y + 13, signs[kind])
        + (_text("sign", x + 5, y + 27, signs["rewired"]) if rewired else "")
        + (_text("many", x + width - 5, y + 13, f"{TIMES}{many}") if many > 1 else "")
        + "</g>"
    )


def lines(group: Group | None, cells: Sequence[Cell], picture: Picture) -> tuple[str, str]:
    """What is written in a cell, or in those that stand as one."""
    if group is None:
        return cells[0].first, cells[0].second
    where = picture.scene.columns.index("parameters") if "parameters" in picture.scene.columns else None
    lane = cells[0].lane
    own = [cell.node for cell in cells if cell.lane == lane]
    size = sum(picture.scene.nodes[node][where] or 0 for node in own) if where is not None else 0
    return group.title, f"{len(own)} node{'s' * (len(own) > 1)}" + (f", {short(size)}" if size else "")


def _legend(scene: Scene, width: float) -> Iterator[tuple[float, int, tuple[str, str]]]:
    """The keys with their places: in lines, as many as fit."""
    x, line = 0.0, 1
    for key in scene.legend:
        text = f"{key.sign} {key.meaning}: {key.count}"
        wide = 6.6 * len(text) + 40
        x, line = (0.0, line + 1) if x and x + wide > width else (x, line)
        yield x, line, (key.kind, text)
        x += wide


def _key(x: float, y: float, kind: str, text: str) -> str:
    box = f'<g class="node {kind}"><rect x="{x:g}" y="{y - 10:g}" width="20" height="12" rx="3"/></g>'
    return box + _text("key", x + 26, y, text)


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{_escaped(text)}</text>' if text else ""


def _clip(text: str, most: int) -> str:
    """Shortened in its middle: paths differ at their ends."""
    if len(text) <= most:
        return text
    return f"{text[: (most - 1) // 2]}\N{HORIZONTAL ELLIPSIS}{text[-(most // 2) :]}"


def _escaped(text: str) -> str:
    """As XML takes it, which knows no control characters."""
    return html.escape("".join(c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in text))
