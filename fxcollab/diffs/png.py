"""The static picture in pixels, for documents that take nothing else; neither a browser nor a font is needed."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from PIL import Image, ImageDraw, ImageFont

from fxcollab.diffs.boxes import Box, Item
from fxcollab.diffs.layered import Point
from fxcollab.diffs.model import Diff
from fxcollab.diffs.picture import TIMES, Edge, Place, change_of, lines_of, picture_of, stack_of

_FINER, _MARGIN, _STEPS = 2, 8, 12
_LARGEST = 30_000_000
"""Pixels: what every program that shows pictures still opens."""


def to_png(diff: Diff, *, dark: bool = False, scale: float = 2.0) -> bytes:
    """The picture of `to_svg` in the colours of one scheme. The same bytes for the same graphs.

    Args:
        diff: the difference.
        dark: light on dark.
        scale: pixels for a unit of the SVG; less where the picture would have more than 30 million of them.
    """
    picture = picture_of(diff)
    width, height = picture.width + 2 * _MARGIN, picture.height + 2 * _MARGIN
    scale = min(scale, (_LARGEST / (width * height)) ** 0.5)
    canvas = _Canvas(width, height, scale, colours(dark))
    for box, place in picture.boxes:
        canvas.box(box, place)
    for edge in picture.edges:
        canvas.edge(edge)
    for box, place in picture.boxes:
        canvas.title(box, place)
    for item, place in picture.items:
        canvas.item(item, place, stack_of(item, diff))
    return canvas.png()


def colours(dark: bool) -> Mapping[str, str]:
    """The page's colours by their names."""
    css = files("fxcollab.diffs").joinpath("page", "colours.css").read_text("utf-8")
    schemes = re.findall(r"[{]([^{}]*)[}]", css)
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", schemes[-1 if dark else 0]))


class _Canvas:
    """Draws in units of the picture, finer than it is written, so that lines come out smooth."""

    def __init__(self, width: float, height: float, scale: float, palette: Mapping[str, str]) -> None:
        self._scale, self._palette = scale * _FINER, palette
        self._size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = (self._size[0] * _FINER, self._size[1] * _FINER)
        self._image = Image.new("RGB", pixels, palette["page"])
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def png(self) -> bytes:
        """The file."""
        buffer = io.BytesIO()
        self._image.resize(self._size, Image.Resampling.BOX).save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def box(self, box: Box, place: Place) -> None:
        """An open box: hardly filled."""
        change = change_of(box)
        self._rectangle(place, 8, f"{self._palette[change]}29", f"{self._palette[f'{change}-line']}8c", 1.0)

    def title(self, box: Box, place: Place) -> None:
        """Of an open box, above the edges."""
        self._text((place.x + 10, place.y + 16), box.title, 12, "quiet", "ls", halo=2.0)

    def item(self, item: Item, place: Place, stack: int) -> None:
        """A node or a closed box with its two lines."""
        change, closed = change_of(item), isinstance(item, Box)
        width = 2.2 if closed else 1.3
        self._rectangle(place, 7, self._palette[change], self._palette[f"{change}-line"], width)
        first, second = lines_of(item)
        middle = place.x + place.width / 2
        self._text((middle, place.y + (17 if second else 24)), first, 12.5, "text", "ms")
        self._text((middle, place.y + 32), second, 11, "quiet", "ms")
        if not isinstance(item, Box):
            self._text((place.x + 7, place.y + 13), item.glyph, 11, "quiet", "ls")
        if stack > 1:
            self._text((place.x + place.width - 6, place.y + 13), f"{TIMES}{stack}", 11, "cloned-line", "rs")

    def edge(self, edge: Edge) -> None:
        """A curve with an arrow at its end."""
        colour, points = self._palette["cloned-line" if edge.added else "edge"], _flat(edge.points)
        pixels = [self._at(point) for point in points]
        self._draw.line(pixels, colour, round(1.4 * self._scale), "curve")
        self._draw.polygon([self._at(point) for point in _arrow(points)], self._palette["edge"])

    def _at(self, point: Point) -> Point:
        return (point[0] + _MARGIN) * self._scale, (point[1] + _MARGIN) * self._scale

    def _rectangle(self, place: Place, radius: float, fill: str, line: str, width: float) -> None:
        corners = (
            self._at((place.x, place.y)),
            self._at((place.x + place.width, place.y + place.height)),
        )
        self._draw.rounded_rectangle(corners, radius * self._scale, fill, line, max(1, round(width * self._scale)))

    def _text(self, point: Point, text: str, size: float, colour: str, anchor: str, *, halo: float = 0.0) -> None:
        self._draw.text(
            self._at(point),
            _plain(text),
            self._palette[colour],
            _font(size * self._scale),
            anchor,
            stroke_width=round(halo * self._scale),
            stroke_fill=self._palette["page"],
        )


def _plain(text: str) -> str:
    """In the characters of Pillow's own font, which is the same everywhere; others by their numbers."""
    text = text.replace(TIMES, "x").replace("\N{HORIZONTAL ELLIPSIS}", "...")
    return text.encode("ascii", "backslashreplace").decode("ascii")


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _flat(points: Sequence[Point]) -> list[Point]:
    """The curve of the SVG as a chain of short lines."""
    start, *between, end = points
    chain = [start]
    for number, bend in enumerate(between, start=1):
        after = points[number + 1]
        stop = end if number == len(between) else ((bend[0] + after[0]) / 2, (bend[1] + after[1]) / 2)
        chain += [_on_curve(start, bend, stop, step / _STEPS) for step in range(1, _STEPS + 1)]
        start = stop
    return chain if between else [start, end]


def _on_curve(start: Point, bend: Point, end: Point, t: float) -> Point:
    x, y = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in zip(start, bend, end, strict=True))
    return x, y


def _arrow(points: Sequence[Point], length: float = 8.0, width: float = 4.0) -> tuple[Point, Point, Point]:
    (x, y), (a, b) = points[-1], points[-2]
    far = ((x - a) ** 2 + (y - b) ** 2) ** 0.5 or 1.0
    dx, dy = (x - a) / far, (y - b) / far
    back = x - dx * length, y - dy * length
    return (x, y), (back[0] - dy * width, back[1] + dx * width), (back[0] + dy * width, back[1] - dx * width)
