"""The difference as JSON data: versioned, and the same for the same graphs."""

from __future__ import annotations

from typing import Any

from fxcollab.diffs.model import Diff, DiffNode

FORMAT = 1


def to_data(diff: Diff) -> dict[str, Any]:
    """Plain data: format, head tree, counts, and all nodes of the training graph in order."""
    tree = diff.tree
    return {
        "format": FORMAT,
        "pattern": diff.pattern,
        "splits": list(tree.splits),
        "fanouts": list(tree.fanouts),
        "heads": tree.heads,
        "mode": "train" if diff.training else "eval",
        "inputs": diff.inputs,
        "unknown": diff.unknown,
        "limitations": list(diff.limitations),
        "counts": {
            "original": diff.count("shared", "own"),
            "cloned": diff.count("cloned"),
            "rescaled": diff.count("rescaled"),
            "copied": diff.count("copied"),
            "state": diff.count("state"),
        },
        "nodes": [_node(node) for node in diff.nodes],
    }


def _node(node: DiffNode) -> dict[str, Any]:
    return {
        "name": node.name,
        "change": node.change,
        "counterpart": node.counterpart,
        "origin": node.origin,
        "branch": node.branch,
        "level": len(node.path),
        "op": node.op,
        "label": node.label,
        "target": node.target,
        "module": node.module,
        "inputs": list(node.inputs),
        "factor": node.factor,
        "shape": list(node.shape) if node.shape is not None else None,
        "dtype": node.dtype,
        "parameters": node.parameters,
        "new_parameters": node.new_parameters,
        "flops": node.flops,
        "source": node.source,
    }
