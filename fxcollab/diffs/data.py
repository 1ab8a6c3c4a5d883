"""The difference as JSON: versioned, and the same for the same graphs."""

from __future__ import annotations

from typing import Any

from fxcollab.diffs.model import DiffData, DiffNode
from fxcollab.io.mark import marked_json

FORMAT = 1


def to_json(diff: DiffData) -> str:
    """Head tree, counts, and all nodes of the training graph in order."""
    return marked_json(to_data(diff))


def to_data(diff: DiffData) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "format": FORMAT,
        "pattern": diff.pattern,
        "splits": diff.tree.splits,
        "fanouts": diff.tree.fanouts,
        "heads": diff.tree.heads,
        "mode": "train" if diff.training else "eval",
        "inputs": diff.inputs,
        "unknown": diff.unknown,
        "limitations": diff.limitations,
        "counts": {
            "original": diff.count("shared", "own"),
            "cloned": diff.count("cloned"),
            "rescaled": diff.count("rescaled"),
            "copied": diff.count("copied"),
            "state": diff.count("state"),
            "rewired": sum(node.rewired for node in diff.nodes),
        },
        "nodes": [_node(node) for node in diff.nodes],
    }


def _node(node: DiffNode) -> dict[str, Any]:
    fields = {name: value for name, value in vars(node).items() if name not in ("kind", "path")}
    return {**fields, "change": node.change, "branch": node.branch, "level": len(node.path)}
