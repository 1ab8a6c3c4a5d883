"""Every command and snippet in the documents runs, and prints what the document says."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.documents.reading import DOCUMENTS, NAMES, ROOT, blocks
from tests.documents.running import INSTALLS, assert_prints, commands, play

QUICK = [name for name in NAMES if any(b.is_run and not b.is_slow for b in blocks((ROOT / name).read_text()))]
SLOW = [name for name in NAMES if any(b.is_run and b.is_slow for b in blocks((ROOT / name).read_text()))]


@pytest.mark.parametrize("name", QUICK)
def test_a_document_shows_what_happens(name: str, tmp_path: Path, seeded: None) -> None:
    assert play((ROOT / name).read_text(), tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_document_shows_what_happens_also_where_it_takes_long(name: str, tmp_path: Path, seeded: None) -> None:
    assert play((ROOT / name).read_text(), tmp_path, slow=True) > 0


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("a\nb\nc\n", "a\n...\nc", True),
        ("a\nc\n", "a\nb\nc", False),
        ("took 3 s", "took ... s", True),
        ("a\nb", "a", False),
    ],
)
def test_dots_stand_for_anything_and_nothing_else_does(printed: str, shown: str, same: bool) -> None:
    if same:
        assert_prints(printed, shown)
    else:
        with pytest.raises(AssertionError):
            assert_prints(printed, shown)


def test_what_is_installed_is_declared() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = set()
    for file in DOCUMENTS:
        for block in blocks(file.read_text()):
            if block.language not in ("sh", "console"):
                continue
            for command in (command for command, _ in commands(block) if INSTALLS.search(command)):
                assert shlex.split(command)
                found |= {name for names in re.findall(r"\[([\w,]+)\]", command) for name in names.split(",")}
    assert found and found <= set(extras)


def test_what_another_test_runs_is_named_there() -> None:
    found = [block for file in DOCUMENTS for block in blocks(file.read_text()) if block.run_by]
    for block in found:
        test = (ROOT / block.run_by).read_text()
        modules = re.findall(r"-m ([\w.]+)", block.text)
        assert modules and all(module in test or f"from {module}" in test for module in modules), block.text
    assert found


def test_little_is_left_out() -> None:
    left_out = [
        (file.name, block.line)
        for file in DOCUMENTS
        for block in blocks(file.read_text())
        if block.note.startswith("not run: ")
    ]
    assert len(left_out) <= 2, "the tests themselves, and what builds an environment; nothing else"
