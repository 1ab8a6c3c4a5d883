"""A private copy of a crossing value, for a branch that writes into it in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils import _pytree as pytree


def private_copy(value: Any) -> Any:
    """A copy of ``value`` that shares no storage with it; gradients pass through unchanged.

    Args:
        value: a tensor of any shape, or any pytree; what is no tensor is handed on.
    """
    if has_torch_function_unary(value):
        return handle_torch_function(private_copy, (value,), value)
    if isinstance(value, Tensor):
        return value.clone()
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


private_copy.__module__ = "fxcollab"
