"""The view that a file's ending names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fxcollab.diffs.dot import to_dot, to_mermaid
from fxcollab.diffs.html import to_html
from fxcollab.diffs.model import Diff
from fxcollab.diffs.png import to_png
from fxcollab.diffs.svg import to_svg
from fxcollab.errors import DiffError, closest
from fxcollab.proof.report import Report

View = Callable[[Diff, Report | None], str | bytes]

VIEWS: Mapping[str, View] = {
    ".html": to_html,
    ".svg": lambda diff, report: to_svg(diff),
    ".png": lambda diff, report: to_png(diff),
    ".json": lambda diff, report: diff.to_json(),
    ".dot": lambda diff, report: to_dot(diff),
    ".mmd": lambda diff, report: to_mermaid(diff),
}


def view_of(path: Path) -> View:
    """The view for a file of this name.

    Raises:
        DiffError: none is named like its ending.
    """
    ending = path.suffix.lower()
    if ending not in VIEWS:
        near = closest(ending, VIEWS)
        raise DiffError(
            f"There is no view of a difference for {path.name!r}.",
            why=f"the ending {ending!r} is unknown" if ending else "it has no ending",
            hint=(f"did you mean {near}? " if near else "") + f"known are {', '.join(VIEWS)}",
        )
    return VIEWS[ending]


def write(diff: Diff, path: Path, report: Report | None = None) -> None:
    """Write what `view_of` finds; ``report`` of `verify` becomes a badge on a page."""
    made = view_of(path)(diff, report)
    path.write_bytes(made.encode("utf-8") if isinstance(made, str) else made)
