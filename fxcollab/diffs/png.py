"""The static picture in pixels, for documents that take nothing else."""

from __future__ import annotations

import re
import struct
import zlib

from fxcollab.diffs.scene import Scene
from fxcollab.diffs.svg import drawn, read
from fxcollab.errors import DiffError
from fxcollab.io.mark import LENGTH, mark_of

_SCALE, _MOST_PIXELS = 2.0, 30_000_000
"""Pixels for a unit of the SVG; fewer where that makes more than most viewers open."""
_END, _KEY = 12, b"Software\0"
"""Bytes of the last chunk of a PNG, and the beginning of the text before it: ``tEXt`` of the specification."""
_SAMPLE = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><style>{}</style><g class="art">{}</g></svg>'


def to_png(scene: Scene) -> bytes:
    """The picture of `to_svg` in its light colours.

    Raises:
        DiffError: resvg is not installed, or finds no font.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        hint = "pip install 'fxcollab[png]', or write .svg"
        raise DiffError("A PNG can't be drawn.", why="resvg-py is not installed", hint=hint) from error
    style = _light(read("drawing.css"))
    letter, empty = (svg_to_bytes(_SAMPLE.format(style, inside)) for inside in ('<text y="9">A</text>', ""))
    if letter == empty:
        raise DiffError(
            "A PNG can't be drawn.",
            why="there is no font for its text",
            hint="install one, such as DejaVu Sans (on Debian: apt-get install fonts-dejavu-core), or write .svg",
        )
    text, (width, height) = drawn(scene, style)
    image: bytes = svg_to_bytes(text, zoom=min(_SCALE, (_MOST_PIXELS / (width * height)) ** 0.5))
    before = image[:-_END] + struct.pack(">I", len(_KEY) + LENGTH) + b"tEXt" + _KEY
    mark = mark_of(before).encode()
    return before + mark + struct.pack(">I", zlib.crc32(b"tEXt" + _KEY + mark)) + image[-_END:]


def _light(style: str) -> str:
    """A style sheet with the values of the page's variables in it, which resvg doesn't know."""
    variables = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", style.partition("}")[0]))
    style = style[style.index("#page") :]
    return re.sub(r"var\(--([a-z-]+)\)", lambda found: variables[found[1]], style)
