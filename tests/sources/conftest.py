"""Files and packages of a user."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import pytest

from tests.sources.helpers import NET, Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files of one folder; each text may come in indented parts."""

    def write_file(*parts: str, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(textwrap.dedent(part) for part in parts))
        return path

    return write_file


@pytest.fixture
def package(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serial: str) -> str:
    """A package in the current directory, under a name that no other test imports."""
    write(NET, "net = Net()\n", name=f"{serial}/nets.py")
    write("", name=f"{serial}/__init__.py")
    monkeypatch.chdir(tmp_path)
    return serial


_numbers = itertools.count()


@pytest.fixture
def serial() -> str:
    return f"source_case_{next(_numbers)}"
