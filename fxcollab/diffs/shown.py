"""What shows itself: by Rich, as plain text in 80 columns, in notebooks, and in files."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path

from rich.console import Console, RenderableType

from fxcollab.diffs.html import to_html
from fxcollab.diffs.notebook import show
from fxcollab.diffs.scene import Scene
from fxcollab.diffs.svg import to_svg
from fxcollab.diffs.views import put, write


class Shown:
    """A difference, with a method for every place where it is shown."""

    @abstractmethod
    def scene(self) -> Scene:
        """What pictures and pages show."""

    @abstractmethod
    def to_json(self) -> str:
        """All of it as versioned JSON, the same bytes for the same graphs."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """The view for a terminal; `str` is the same in 80 columns, without colours."""

    def save(self, path: str | os.PathLike[str], *, force: bool = True) -> None:
        """Write the view that the file's ending names: .html, .svg, .png, .json, or .dot of a training graph.

        Args:
            path: the file.
            force: replace a file that this method wrote.

        Raises:
            OutputError: the file exists, and may not be replaced.
            DiffError: there is no view for this ending, or it needs a package that is not installed.
        """
        write(self, Path(path), force)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page, which works offline."""
        put(to_html(self.scene()), Path(path))

    def to_svg(self, path: str | os.PathLike[str]) -> None:
        """Write a static picture; neither a browser nor ``dot`` is needed."""
        put(to_svg(self.scene()), Path(path))

    def _ipython_display_(self) -> None:
        """In a notebook: the picture, and the page below it, which is left out where scripts are not shown."""
        show(self.scene())

    def __str__(self) -> str:
        console = Console(width=80, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()
