"""The views that can be written to files. A new one is a file beside this one, and a line in `VIEWS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from fxcollab.diffs.html import to_html
from fxcollab.diffs.model import GENERATOR
from fxcollab.diffs.png import to_png
from fxcollab.diffs.scene import Scene
from fxcollab.diffs.svg import to_svg
from fxcollab.errors import DiffError, closest
from fxcollab.io.folder import beside
from fxcollab.io.weights import refuse_existing_file

_FIRST_BYTES = 1024


class Difference(Protocol):
    """What views are made of."""

    def scene(self) -> Scene:
        """What is drawn."""

    def to_json(self) -> str:
        """All of it."""


def _dot(found: Difference) -> str:
    if not hasattr(found, "to_dot"):
        raise DiffError("Two graphs can't be drawn as .dot.", hint="write .html, .svg, .png or .json")
    return str(found.to_dot())


VIEWS: Mapping[str, Callable[[Difference], str | bytes]] = {
    ".html": lambda found: to_html(found.scene()),
    ".svg": lambda found: to_svg(found.scene()),
    ".png": lambda found: to_png(found.scene()),
    ".json": lambda found: found.to_json(),
    ".dot": _dot,
}
"""By the ending of the file. Every view has `GENERATOR` in its first bytes."""


def write(diff: Difference, path: Path) -> None:
    """Write the view that the file's ending names; the file appears whole, or stays as it was.

    Raises:
        DiffError: there is no such view.
    """
    made = _view(path)(diff)
    draft = beside(path.resolve())
    try:
        draft.write_bytes(made.encode("utf-8") if isinstance(made, str) else made)
        draft.replace(path.resolve())
    finally:
        draft.unlink(missing_ok=True)


def refuse_unwritable(path: Path, force: bool) -> None:
    """Refuse a file that exists; with ``force``, one that `write` didn't write.

    Raises:
        ArtifactError: it exists.
        DiffError: it is not a view, there is no folder for it, or no view for its ending.
    """
    _view(path)
    if not path.parent.is_dir():
        raise DiffError(
            f"{path} can't be written.", why=f"there is no folder {path.parent}", hint=f"mkdir -p {path.parent}"
        )
    refuse_existing_file(path, force)
    if path.exists() and not is_view(path):
        raise DiffError(
            f"{path} is not replaced.", why="fxcollab diff did not write it", hint="give another name, or move it"
        )


def is_view(path: Path) -> bool:
    """Whether `write` made this file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(_FIRST_BYTES)


def _view(path: Path) -> Callable[[Difference], str | bytes]:
    ending = path.suffix.lower()
    if ending not in VIEWS:
        near = closest(ending, VIEWS)
        raise DiffError(
            f"There is no view of a difference for {path.name!r}.",
            why=f"the ending {ending!r} is unknown" if ending else "it has no ending",
            hint=(f"did you mean {near}? " if near else "") + f"known are {', '.join(VIEWS)}",
        )
    return VIEWS[ending]
