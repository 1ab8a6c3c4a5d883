"""Summaries and costs as text, a label beside each line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

LABEL_WIDTH = 12


class Entry(NamedTuple):
    """A line: what it is about, what is said, and what may be shown less brightly."""

    label: str
    text: str
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.label:<{LABEL_WIDTH}}{self.text}{self.remark}".rstrip()


def as_text(lines: Iterable[object]) -> str:
    """One line for each."""
    return "\n".join(map(str, lines))


def before_and_after(pair: tuple[int, int], unit: str = "") -> str:
    """Two numbers and their ratio: ``1.2M -> 2.4M  (2.00x)``."""
    before, after = pair
    return f"{_short(before)}{unit} -> {_short(after)}{unit}" + (f"  ({after / before:.2f}x)" if before else "")


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.4g}{unit}"
        number /= 1000
    raise AssertionError
