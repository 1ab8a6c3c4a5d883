"""A training graph as a scene: the inference graph is the first lane with the trunk above it, every head a lane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from math import prod

import torch

from fxcollab.diffs.model import MEANINGS, DiffData, DiffNode, short
from fxcollab.diffs.scene import TIMES, Item, Key, Scene, drawing_of, fraction

COLUMNS = (
    "node", "kind", "rewired", "in inference", "branch", "does", "target", "shape", "type", "parameters", "FLOPs",
    "memory", "gradient", "source", "reads",
)  # fmt: skip
"""What the page knows of a node; ``memory`` is that of its value in bytes."""


def scene_of(diff: DiffData) -> Scene:
    """Rows are the inference graph's nodes in its order; what another pass added to one head stands in its lane."""
    numbers = {node.name: number for number, node in enumerate(diff.nodes)}
    items = [_item(node, tuple(numbers[name] for name in node.inputs)) for node in diff.nodes]
    runs = groupby(range(len(items)), lambda number: diff.nodes[number].in_inference)
    return Scene(
        title=diff.title,
        facts=diff.facts,
        sides=("",),
        drawing=drawing_of(items, [diff.tree], [("head 0", "kept: the inference graph")]),
        legend=tuple(_legend(diff)),
        columns=COLUMNS,
        nodes=tuple(_facts(node, numbers) for node in diff.nodes),
        hunks=tuple(tuple(run) for kept, run in runs if not kept),
        notes=tuple((head, text) for head, text in _notes(diff) if text),
        checks=None if diff.report is None else tuple((c.name, c.ok, c.detail) for c in diff.report),
    )


def _item(node: DiffNode, inputs: tuple[int, ...]) -> Item:
    """Inserted nodes stand on the way of the value that they read; a parameter that is passed in is a cell."""
    on_the_way = node.counterpart is None and bool(inputs)
    mark = f"grad {TIMES} {fraction(node.factor)}" if node.factor is not None else node.change
    inside = node.op == "call_module" and node.module and node.target.startswith(f"{node.module}.")
    name = node.target[len(node.module) + 1 :] if inside else node.counterpart or node.name
    shape = TIMES.join(map(str, node.shape or ()))
    return Item(
        side=0,
        key=node.counterpart or node.name,
        path=node.path,
        kind=node.change,
        first=name,
        second=" ".join(filter(None, ("" if node.label == name else node.label, shape))),
        inputs=inputs,
        module=node.module,
        mark=mark if on_the_way else "",
        rewired=node.rewired,
        output=node.op == "output",
    )


def _legend(diff: DiffData) -> Iterator[Key]:
    for kind, (sign, meaning) in MEANINGS.items():
        count = sum(node.rewired for node in diff.nodes) if kind == "rewired" else diff.count(kind)
        if count or kind in ("shared", "own", "cloned", "rescaled"):
            yield Key(kind, sign, meaning, count)


def _facts(node: DiffNode, numbers: Mapping[str, int]) -> tuple[object, ...]:
    return (
        node.name, node.change, node.rewired or None, node.counterpart, node.branch or "trunk", node.label,
        node.target, TIMES.join(map(str, node.shape)) if node.shape else None, node.dtype, node.parameters or None,
        node.flops or None, _bytes(node), node.factor, node.source, [numbers[name] for name in node.inputs],
    )  # fmt: skip


def _bytes(node: DiffNode) -> int | None:
    kind = getattr(torch, node.dtype or "", None)
    return prod(node.shape) * kind.itemsize if node.shape is not None and isinstance(kind, torch.dtype) else None


def _notes(diff: DiffData) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "head tree", tuple(_levels(diff))
    yield "shapes and FLOPs are unknown", (diff.unknown,) if diff.unknown else ()
    yield "limitations", diff.limitations


def _levels(diff: DiffData) -> Iterator[str]:
    """What a branch of each level holds."""
    for level in range(diff.tree.depth + 1):
        nodes = diff.of_branch((0,) * level)
        kept, size = sum(node.in_inference for node in nodes), sum(node.new_parameters for node in nodes)
        name = f"level {level}: {diff.tree.branches(level)} branches, each" if level else "trunk, for all heads:"
        yield f"{name} {kept} node{'s' * (kept != 1)}, {short(size)} parameters"
