"""The files of the page, which the static picture shares."""

from __future__ import annotations

from importlib.resources import files


def read(name: str) -> str:
    """The text of a file in the folder ``page``."""
    return files("fxcollab.diffs").joinpath("page", name).read_text(encoding="utf-8")
