"""Which version of the passes a row was measured with."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import fxcollab

PASSES = ("analysis", "codegen", "proof", "rewriting", "runtime", "splits", "tracing")
"""Rooms of fxcollab that decide what becomes of a model."""


@cache
def version() -> str:
    """A short hash of the passes' source files."""
    root = Path(fxcollab.__file__).parent
    files = sorted(file for room in PASSES for file in (root / room).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
