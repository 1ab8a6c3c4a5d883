"""What `fxcollab.diff` returns for one training model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from rich.console import RenderableType

from fxcollab.diffs.data import to_json
from fxcollab.diffs.dot import to_dot
from fxcollab.diffs.model import DiffData
from fxcollab.diffs.scene import Scene
from fxcollab.diffs.scene_diff import scene_of
from fxcollab.diffs.shown import Shown
from fxcollab.diffs.terminal import view
from fxcollab.proof.report import Report


@dataclass(frozen=True)
class Diff(Shown, DiffData):
    """A training graph beside its inference graph; prints in a terminal, and shows itself in a notebook."""

    def scene(self) -> Scene:
        """What pictures and pages show."""
        return scene_of(self)

    def save(self, path: str | os.PathLike[str], report: Report | None = None, *, force: bool = True) -> None:
        """As `Shown.save`; ``report`` of `verify` is shown on a page."""
        super(Diff, self if report is None else replace(self, report=report)).save(path, force=force)

    def to_html(self, path: str | os.PathLike[str], report: Report | None = None) -> None:
        """As `Shown.to_html`; ``report`` of `verify` becomes a badge."""
        super(Diff, self if report is None else replace(self, report=report)).to_html(path)

    def to_dot(self) -> str:
        """The training graph in Graphviz's DOT: a cluster a branch."""
        return to_dot(self)

    def to_json(self) -> str:
        """All of it as versioned JSON, the same bytes for the same graphs."""
        return to_json(self)

    def __rich__(self) -> RenderableType:
        """The view for a terminal."""
        return view(self)
