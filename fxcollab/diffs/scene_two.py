"""Two graphs as a scene: side by side, what was matched on one row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxcollab.diffs.comparison import SIGNS, ComparisonData, GraphNode, Row
from fxcollab.diffs.scene import Item, Key, Scene, drawing_of

COLUMNS = ("node", "kind", "graph", "in the other", "difference", "branch", "does", "options", "reads")


def scene_of(comparison: ComparisonData) -> Scene:
    """Rows are the second graph's nodes in its order, and where they were, those that it lacks."""
    nodes = list(_nodes(comparison))
    numbers = {(side, node.name): number for number, (side, node, _) in enumerate(nodes)}
    keys = _keys(comparison)
    items = [_item(side, node, row, keys[side, node.name], numbers) for side, node, row in nodes]
    return Scene(
        title=f"A against B: {comparison.facts}",
        facts=f"A is {comparison.a}; B is {comparison.b}",
        sides=(f"A: {comparison.a}", f"B: {comparison.b}"),
        drawing=drawing_of(
            items,
            comparison.trees,
            [
                (f"{name}: head 0" if tree else name, text)
                for name, tree, text in (
                    ("A", comparison.trees[0], comparison.a),
                    ("B", comparison.trees[1], comparison.b),
                )
            ],
        ),
        legend=tuple(Key(kind, sign, meaning, comparison.count(kind)) for kind, (sign, meaning) in SIGNS.items()),
        columns=COLUMNS,
        nodes=tuple(_facts(side, node, row, numbers) for side, node, row in nodes),
        hunks=tuple(tuple(_number(row, numbers) for row in hunk) for hunk in comparison.hunks),
    )


def _nodes(comparison: ComparisonData) -> Iterator[tuple[int, GraphNode, Row]]:
    for row in comparison.rows:
        yield from ((side, node, row) for side, node in enumerate((row.a, row.b)) if node)


def _keys(comparison: ComparisonData) -> dict[tuple[int, str], str]:
    """The row of every node: that of the second graph's node which its origin became, else one of its own."""
    became = {row.a.origin: row.b.origin for row in comparison.rows if row.a and row.b and not any(row.a.path)}
    found: dict[tuple[int, str], str] = {}
    taken: set[tuple[int, tuple[int, ...], str]] = set()
    for side, node, row in _nodes(comparison):
        key = row.b.origin if row.b else became.get(node.origin, f"a {node.origin}")
        place = side, _head(node.path), key
        found[side, node.name] = f"{key} {node.name}" if place in taken else key
        taken.add(place)
    return found


def _head(path: tuple[int, ...]) -> tuple[int, ...]:
    """The branch by which a lane is called: zeros at the end go on in the lane."""
    while path and path[-1] == 0:
        path = path[:-1]
    return path


def _item(side: int, node: GraphNode, row: Row, key: str, numbers: dict[tuple[int, str], int]) -> Item:
    inputs = tuple(numbers[side, name] for name in node.inputs)
    name = node.origin if node.path else node.name
    label = node.label if node.label != name else ""
    return Item(
        side,
        key,
        node.path,
        row.status,
        name,
        row.what or label,
        inputs,
        node.module,
        node.mark,
        output=node.op == "output",
    )


def _facts(side: int, node: GraphNode, row: Row, numbers: dict[tuple[int, str], int]) -> tuple[Any, ...]:
    other = row.a if side else row.b
    reads = [numbers[side, name] for name in node.inputs]
    what = row.what or None
    return (
        node.name,
        row.status,
        "ab"[side],
        other and other.name,
        what,
        node.branch or None,
        node.label,
        node.description,
        reads,
    )


def _number(row: Row, numbers: dict[tuple[int, str], int]) -> int:
    return numbers[1, row.b.name] if row.b else numbers[0, row.a.name if row.a else ""]
