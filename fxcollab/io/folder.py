"""The artifact's folder: it appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxcollab.errors import ArtifactError

PLAN, WEIGHTS, GRAPH, PAGE = "plan.json", "weights.safetensors", "graph.py", "diff.html"
FILES = frozenset({PLAN, WEIGHTS, GRAPH, PAGE})
"""What an artifact's folder may hold and ``force`` may replace."""


def refuse_existing(target: Path, force: bool) -> None:
    """Raise an `ArtifactError` where the output directory exists; with ``force``, unless it is an artifact only."""
    if not target.exists():
        return
    if not force:
        raise ArtifactError(
            "The output directory exists.", where=str(target), hint="give another one, or force=True (--force)"
        )
    if not (target / PLAN).is_file():
        raise ArtifactError(
            "The output directory is not an artifact and is not replaced.",
            where=str(target),
            why=f"it has no {PLAN}" if target.is_dir() else "it is a file",
            hint="give a directory that does not exist",
        )
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in FILES)
    if others:
        raise ArtifactError(
            "The output directory holds other files and is not replaced.",
            where=str(target),
            why=f"{', '.join(others[:4])}{' and more' if len(others) > 4 else ''} would be lost",
            hint="move them away, or give another directory",
        )


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place on leaving without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = beside(target)
    folder.mkdir()
    try:
        yield folder
        _swap(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, target: Path) -> None:
    """Replace ``target`` by ``folder``; where that fails, ``target`` stays."""
    if not target.exists():
        folder.replace(target)
        return
    old = beside(target)
    target.replace(old)
    try:
        folder.replace(target)
    except BaseException:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def beside(target: Path) -> Path:
    """A hidden, unused path in the same folder."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")
