"""What `fxcollab.diff` returns: the difference, with a method for every place where it is shown."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import RenderableType

from fxcollab.diffs.data import to_json
from fxcollab.diffs.dot import to_dot
from fxcollab.diffs.html import to_html
from fxcollab.diffs.model import DiffData
from fxcollab.diffs.notebook import show
from fxcollab.diffs.shown import Shown
from fxcollab.diffs.svg import to_svg
from fxcollab.diffs.terminal import view
from fxcollab.diffs.views import put, write
from fxcollab.proof.report import Report


@dataclass(frozen=True)
class Diff(Shown, DiffData):
    """A training graph beside its inference graph; prints in a terminal, and shows itself in a notebook."""

    def save(self, path: str | os.PathLike[str], report: Report | None = None, *, force: bool = True) -> None:
        """Write the view that the file's ending names: .html, .svg, .png, .json, .dot or .mmd (Mermaid).

        Args:
            path: the file.
            report: what `verify` found, to be shown on a page.
            force: replace a file that this method wrote.

        Raises:
            OutputError: the file exists, and may not be replaced.
            DiffError: there is no view for this ending, or it needs a package that is not installed.
        """
        write(self if report is None else replace(self, report=report), Path(path), force)

    def to_html(self, path: str | os.PathLike[str], report: Report | None = None) -> None:
        """Write one self-contained page, which works offline; ``report`` of `verify` becomes a badge."""
        put(to_html(self if report is None else replace(self, report=report)), Path(path))

    def to_svg(self, path: str | os.PathLike[str]) -> None:
        """Write a static picture; neither a browser nor ``dot`` is needed."""
        put(to_svg(self), Path(path))

    def to_dot(self) -> str:
        """The training graph in Graphviz's DOT: a cluster a branch."""
        return to_dot(self)

    def to_json(self) -> str:
        """All of it as versioned JSON, the same bytes for the same graphs."""
        return to_json(self)

    def _ipython_display_(self) -> None:
        """In a notebook: the picture, and the page below it, which is left out where scripts are not shown."""
        show(self)

    def __rich__(self) -> RenderableType:
        """The view for a terminal."""
        return view(self)
