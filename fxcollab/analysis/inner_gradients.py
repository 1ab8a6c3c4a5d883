"""Gradients that a forward computes itself: a split must not scale them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxcollab._torch import pytree
from fxcollab.errors import SplitError


def refuse_gradients_across_splits(levels: Mapping[fx.Node, int], splits: Sequence[str]) -> None:
    """Raise a SplitError where ``torch.autograd.grad`` differentiates by a value of another level than its own."""
    for node, level in levels.items():
        if node.target is not torch.autograd.grad:
            continue
        inputs = node.kwargs["inputs"] if "inputs" in node.kwargs else node.args[1]
        for value in pytree.tree_leaves(inputs):
            if isinstance(value, fx.Node) and levels[value] < level:
                split = splits[levels[value]] if splits else "the input"
                raise SplitError(
                    f"The forward differentiates through {f'split {split!r}' if splits else split}.",
                    where=f"{node.name}: torch.autograd.grad by {value.name}",
                    why="a split scales what comes back through it, also the gradients that the forward computes",
                    hint=f"use pattern 'multi-instance', or split before {value.name!r} or behind {node.name!r}"
                    if splits
                    else f"compute {value.name!r} in the forward: x = x.detach().requires_grad_()",
                )
