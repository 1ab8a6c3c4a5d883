"""A scene as one self-contained HTML file that works offline."""

from __future__ import annotations

import html
import json
from string import Template
from typing import Any

from fxcollab.diffs.layout import Group, laid_out
from fxcollab.diffs.picture import METRICS
from fxcollab.diffs.scene import Scene
from fxcollab.diffs.svg import DEFINITIONS, read
from fxcollab.io.mark import marked_markup


def to_html(scene: Scene) -> str:
    """A page: the drawing, details, a table, the proof. The same bytes for the same graphs."""
    parts = {
        "TITLE": html.escape(scene.title),
        "FACTS": html.escape(scene.facts),
        "CSS": read("drawing.css") + read("page.css"),
        "DEFINITIONS": DEFINITIONS,
        "DATA": json.dumps(_data(scene), separators=(",", ":")).replace("<", "\\u003c"),  # can't close the script
        "SCRIPT": read("draw.js") + read("main.js"),
    }
    return marked_markup(Template(read("page.html")).substitute(parts))


def _data(scene: Scene) -> dict[str, Any]:
    layout = laid_out(scene)
    wires = zip(scene.drawing.wires, layout.tracks, strict=True)
    return {
        "metrics": METRICS,
        "sides": scene.sides,
        "rows": len(scene.drawing.modules),
        "lanes": [(lane.title, lane.note, lane.side, lane.merges) for lane in scene.drawing.lanes],
        "splits": scene.drawing.splits,
        "groups": [_group(group) for group in layout.groups],
        "cells": [(c.node, c.row, c.lane, c.kind, c.first, c.second, c.rewired) for c in scene.drawing.cells],
        "wires": [(w.source, w.target, w.mark, -1 if t is None else t, w.inserted) for w, t in wires],
        "legend": [(key.kind, key.sign, key.meaning, key.count) for key in scene.legend],
        "columns": scene.columns,
        "nodes": scene.nodes,
        "hunks": scene.hunks,
        "notes": scene.notes,
        "checks": scene.checks,
    }


def _group(group: Group) -> tuple[Any, ...]:
    return group.title, group.start, group.stop, [_group(child) for child in group.children]
