"""Measured figures in the documents are those of the rows."""

from __future__ import annotations

import re

import pytest

from samples.guides.figures import FIGURES, filled
from tests.documents.reading import DOCUMENTS, NAMES, ROOT, made, prose, without_made

MEASURED = re.compile(r"(?<![\w.])\d+(?:,\d{3}|\.\d+| ?%|\.?\d*x\b)")
"""A number with decimals, thousands, per cent, or a ratio."""
VERSIONS = re.compile(r"Apache-2.0|(Python|PyTorch|torch|torchvision|CUDA) \d+(\.\d+)*|\d+\.\d+\.\d+")


@pytest.mark.parametrize("name", NAMES)
def test_generated_figures_are_those_of_the_rows(name: str) -> None:
    text = (ROOT / name).read_text()
    assert filled(text) == text, "run python -m samples.guides.figures"


def test_every_figure_has_its_place() -> None:
    assert {name for file in DOCUMENTS for name in made(file.read_text())} == set(FIGURES)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("versions.md")])
def test_no_measured_figure_is_typed(name: str) -> None:
    text = VERSIONS.sub("", prose(without_made((ROOT / name).read_text())))
    assert not MEASURED.findall(text)
