"""The results in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def summary(structure: Sequence[Row], values: Sequence[Row]) -> Iterator[str]:
    """The tables, what was not ok with its reason, and what was given up how often."""
    yield "# The zoo"
    yield ""
    yield "Captured, transformed (hierarchical, two splits) and recovered: every model of each library."
    yield ""
    yield from _structure_table(structure)
    yield ""
    yield "The whole proof on real weights: outputs bit for bit, gradients by the mean-gradient rule."
    yield ""
    yield from _values_table(values)
    yield from dict.fromkeys(_reasons([*structure, *values]))  # most fail in both in one way


def library_of(row: Row) -> str:
    """The library a row's model is from."""
    return str(row["name"]).partition(":")[0]


def _structure_table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| library | models | recovered exactly | refused | symbolic_trace: keys in order | all keys | traced "
        "| feature extractor |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for library, mine in _by_library(rows):
        plain = Counter(row.get("plain") for row in mine)
        extractor = sum(row.get("extractor") == "ok" for row in mine)
        results = Counter(row["result"] for row in mine)
        yield (
            f"| {library} | {len(mine)} | {results['ok']} | {results['refused']} | {plain['ok']} "
            f"| {plain['ok'] + plain['order differs']} "
            f"| {plain['ok'] + plain['order differs'] + plain['keys differ']} | {extractor} |"
        )


def _values_table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| library | models | families | proved | checks |"
    yield "|---|---|---|---|---|"
    for library, mine in _by_library(rows):
        proved = sum(row["result"] == "ok" for row in mine)
        families = len({row["family"] for row in mine})
        yield f"| {library} | {len(mine)} | {families} | {proved} | {sum(row.get('checks', 0) for row in mine)} |"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    bad = [row for row in rows if row["result"] != "ok"]
    if bad:
        yield from ("", "## Not recovered", "")
    for row in bad:
        yield f"- `{row['name']}` ({row['result']}): {_reason(row)}"


def _reason(row: Row) -> str:
    if "error" in row:
        return " ".join(f"{label}: {text}" for label, text in row["error"].items() if text)
    return "; ".join(row.get("wrong", ())) or str(row.get("why"))


def _by_library(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for library in dict.fromkeys(map(library_of, rows)):
        yield library, [row for row in rows if library_of(row) == library]
