"""The difference as one self-contained HTML file that works offline."""

from __future__ import annotations

import html
import json
from importlib.resources import files

from fxcollab.diffs.boxes import boxes_of
from fxcollab.diffs.data import to_data
from fxcollab.diffs.model import Change, Diff
from fxcollab.proof.report import Report

_COUNTED: tuple[Change, ...] = ("cloned", "rescaled", "copied", "state")
_SCRIPTS = ("groups.js", "layout.js", "draw.js", "panel.js", "main.js")


def to_html(diff: Diff, report: Report | None = None) -> str:
    """A page: the drawing, details, a table, the passes. The same bytes for the same graphs.

    Args:
        diff: the difference.
        report: what `verify` found, to be shown as a badge.
    """
    tree = diff.tree
    changes = "".join(f", {diff.count(change)} {change}" for change in _COUNTED if diff.count(change))
    splits = f", split at {', '.join(tree.splits)}" if tree.splits else ""
    parts = {
        "TITLE": f"{diff.pattern}, {tree.heads} heads",
        "FACTS": html.escape(
            f"{'train' if diff.training else 'eval'} mode: {diff.count('shared', 'own')} nodes of the original"
            f"{changes}{splits}"
        ),
        "PAGE_CSS": _read("colours.css") + _read("page.css"),
        "DRAWING_CSS": _read("drawing.css"),
        "DATA": _data(diff, report),
        "SCRIPT": "\n".join([_library(), *map(_read, _SCRIPTS)]),
    }
    page, rest = "", _read("page.html")
    while "@" in rest:  # one pass: what is put in is never looked at again
        before, _, rest = rest.partition("@")
        name, _, rest = rest.partition("@")
        page += before + parts[name]
    return page + rest


def _data(diff: Diff, report: Report | None) -> str:
    """JSON that can't end the script element it stands in."""
    proof = report and {"checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in report]}
    data = {**to_data(diff), "boxes": boxes_of(diff).to_data(), "proof": proof}
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _library() -> str:
    """Dagre, with its licence; without the line that names a map, which nobody has."""
    lines = _read("dagre.min.js").splitlines()
    script = "\n".join(line for line in lines if not line.startswith(("//#", "/*!")))
    return f"/* dagre, https://github.com/dagrejs/dagre\n\n{_read('dagre.LICENSE')}*/\n{script}"


def _read(name: str) -> str:
    return files("fxcollab.diffs").joinpath("page", name).read_text(encoding="utf-8")
