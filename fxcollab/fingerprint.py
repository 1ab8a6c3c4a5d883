"""A hash of graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import fx

from fxcollab.fx_utils import describe_node
from fxcollab.runtime.operators import guard


def fingerprint(graphs: Iterable[fx.Graph]) -> str:
    """A hash of every node's name, op, target and arguments, in order."""
    digest = hashlib.sha256()
    for graph in graphs:
        for node in graph.nodes:
            name, op, target, args, kwargs, _ = describe_node(node)
            args = args[:-1] if target is guard else args  # its last argument is a source line, which may move
            called = target if isinstance(target, str) else torch.typename(target)
            called = getattr(target, "__name__", called) if callable(target) else called
            digest.update(f"{op} {name} {called} {args} {kwargs}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()
