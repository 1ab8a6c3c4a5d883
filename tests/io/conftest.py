"""A saved training model, and a user's file."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import fxcollab
from tests.io.helpers import SOURCE, Net, _numbers, made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return fxcollab.save(made(Net, "a", "b"), tmp_path / "run")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A user's file in a folder of its own."""
    path = tmp_path / "project" / f"model_{next(_numbers)}.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(SOURCE))
    return path
