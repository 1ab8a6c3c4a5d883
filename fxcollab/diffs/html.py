"""The difference as one self-contained HTML file that works offline."""

from __future__ import annotations

import html
import json
from string import Template

from fxcollab.diffs.boxes import boxes_of
from fxcollab.diffs.data import to_data
from fxcollab.diffs.model import GENERATOR, Change, DiffData
from fxcollab.diffs.resources import read

_COUNTED: tuple[Change, ...] = ("cloned", "rescaled", "copied", "state")
_SCRIPTS = ("groups.js", "layout.js", "draw.js", "panel.js", "main.js")


def to_html(diff: DiffData) -> str:
    """A page: the drawing, details, a table, the passes, the proof. The same bytes for the same graphs."""
    tree = diff.tree
    changes = "".join(f", {diff.count(change)} {change}" for change in _COUNTED if diff.count(change))
    splits = f", split at {', '.join(tree.splits)}" if tree.splits else ""
    parts = {
        "GENERATOR": GENERATOR,
        "TITLE": f"{diff.pattern}, {tree.heads} heads",
        "FACTS": html.escape(
            f"{'train' if diff.training else 'eval'} mode: {diff.count('shared', 'own')} nodes of the original"
            f"{changes}{splits}"
        ),
        "PAGE_CSS": read("colours.css") + read("page.css"),
        "DRAWING_CSS": read("drawing.css"),
        "DATA": _data(diff),
        "SCRIPT": "\n".join([_library(), *map(read, _SCRIPTS)]),
    }
    return Template(read("page.html")).substitute(parts)


def _data(diff: DiffData) -> str:
    """JSON that can't close the script element around it."""
    report = diff.report
    proof = report and {"checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in report]}
    data = {**to_data(diff), "boxes": boxes_of(diff).to_data(), "proof": proof}
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _library() -> str:
    """Dagre with its licence, without the link to a source map."""
    lines = read("dagre.min.js").splitlines()
    script = "\n".join(line for line in lines if not line.startswith(("//#", "/*!")))
    return f"/* dagre, https://github.com/dagrejs/dagre\n\n{read('dagre.LICENSE')}*/\n{script}"
