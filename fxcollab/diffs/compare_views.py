"""A comparison of two graphs for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.text import Text

from fxcollab.diffs.comparison import SIGNS, ComparisonData, Row, Status
from fxcollab.io.mark import marked_json

STYLES: Mapping[Status, str] = {
    "removed": "red", "added": "green", "changed": "yellow", "rewired": "cyan", "same": "dim"
}  # fmt: skip
FORMAT = 1


def view(comparison: ComparisonData, *, unfolded: bool = False) -> RenderableType:
    """Text for a console of any width, with or without colours: every place where the graphs differ, with a number.

    Args:
        comparison: of two graphs.
        unfolded: also nodes that are the same.
    """
    heading = [Text(f"A  {comparison.a}", "bold"), Text(f"B  {comparison.b}", "bold")]
    legend = Text(
        "  ".join(f"{sign} {meaning}" for status, (sign, meaning) in SIGNS.items() if status != "same"), "dim"
    )
    rows = map(_line, comparison.rows) if unfolded else _hunks(comparison)
    return Group(*heading, *rows, legend, _counts(comparison))


def _hunks(comparison: ComparisonData) -> Iterator[Text]:
    for number, hunk in enumerate(comparison.hunks, 1):
        yield Text(f"change {number} of {len(comparison.hunks)}", "dim")
        yield from map(_line, hunk)


def _line(row: Row) -> Text:
    node = row.b or row.a
    assert node is not None
    text = Text(f"{SIGNS[row.status][0]} {node.name}", STYLES[row.status])
    if row.a and row.b and row.a.name != row.b.name:
        text.append(f" (in A {row.a.name})", "dim")
    told = row.what or node.label
    return text.append(f"  {told}", "dim") if told != node.name else text


def _counts(comparison: ComparisonData) -> Text:
    found = Text()
    for status, (sign, _) in SIGNS.items():
        found.append(f"{sign} {comparison.count(status)} {status}  ", STYLES[status])
    return found


def to_json(comparison: ComparisonData) -> str:
    """Versioned JSON: counts, and all rows in order."""
    data = {
        "comparison": FORMAT,
        "a": comparison.a,
        "b": comparison.b,
        "counts": {status: comparison.count(status) for status in SIGNS},
        "rows": [asdict(row) for row in comparison.rows],
    }
    return marked_json(data)
