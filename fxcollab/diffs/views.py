"""The views that can be written to files. A new one is a function of a difference, and a line in `VIEWS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from fxcollab.diffs.html import to_html
from fxcollab.diffs.png import to_png
from fxcollab.diffs.scene import Scene
from fxcollab.diffs.svg import to_svg
from fxcollab.errors import DiffError, closest
from fxcollab.io.files import only, refuse_existing_file, written
from fxcollab.io.mark import encoded
from fxcollab.io.recognise import is_generated


class Difference(Protocol):
    """What views are made of."""

    def scene(self) -> Scene:
        """What is drawn."""

    def to_json(self) -> str:
        """All of it."""


def _dot(found: Difference) -> str:
    if not hasattr(found, "to_dot"):
        others = ", ".join(ending for ending in VIEWS if ending != ".dot")
        raise DiffError("Two graphs can't be drawn as .dot.", hint=f"write one of {others}")
    return str(found.to_dot())


VIEWS: Mapping[str, Callable[[Difference], str | bytes]] = {
    ".html": lambda found: to_html(found.scene()),
    ".svg": lambda found: to_svg(found.scene()),
    ".png": lambda found: to_png(found.scene()),
    ".json": lambda found: found.to_json(),
    ".dot": _dot,
}
"""By the ending of the file. Every view ends with its mark (`fxcollab.io.mark`)."""


def write(diff: Difference, path: Path, force: bool = True) -> None:
    """Write the view that the file's ending names; the file appears whole, or stays as it was.

    Args:
        diff: what to show.
        path: the file.
        force: replace a file that this function wrote.

    Raises:
        DiffError: there is no such view.
        OutputError: the file exists, and may not be replaced.
    """
    put(_view(path)(diff), path, force)


def put(made: str | bytes, path: Path, force: bool = True) -> None:
    """Write a view to a file, as `write` does, whatever its ending."""
    with written(path, force, only(is_generated)) as draft:
        draft.write_bytes(encoded(made) if isinstance(made, str) else made)


def refuse_unwritable(path: Path, force: bool) -> None:
    """Refuse a file that exists; with ``force``, one that `write` didn't write.

    Raises:
        OutputError: it exists, and may not be replaced.
        DiffError: there is no folder for it, or no view for its ending.
    """
    _view(path)
    if not path.parent.is_dir():
        raise DiffError(
            f"{path} can't be written.", why=f"there is no folder {path.parent}", hint=f"mkdir -p {path.parent}"
        )
    refuse_existing_file(path, force, is_generated)


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
