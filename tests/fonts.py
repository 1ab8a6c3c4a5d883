"""Whether a PNG can be drawn here: resvg takes the system's fonts, and some machines have none."""

from __future__ import annotations

import pytest
from resvg_py import svg_to_bytes

_SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{}</svg>'

has_font = svg_to_bytes(_SVG.format('<text y="9">A</text>')) != svg_to_bytes(_SVG.format(""))
needs_a_font = pytest.mark.skipif(not has_font, reason="no font is installed, and PNGs need one")
