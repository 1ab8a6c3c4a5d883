"""A private copy of a crossing value, for a branch that writes into it in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fxcollab._torch import is_batched
from fxcollab.runtime.tensors import map_tensors


def private_copy(value: Any) -> Any:
    """A copy of ``value`` that shares no storage with it, laid out alike; gradients pass through unchanged.

    Args:
        value: a tensor of any shape, any pytree, or an object, of which a deep copy is made.
    """
    if has_torch_function_unary(value):
        return handle_torch_function(private_copy, (value,), value)
    if isinstance(value, Tensor):
        return _copy(value)
    return map_tensors(_copy, value, copy_objects=True)


private_copy.__module__ = "fxcollab"


def _copy(value: Tensor) -> Tensor:
    """A clone with the same strides, also of a view with gaps: sums over another layout are rounded differently."""
    copy = value.clone()
    if value.layout is not torch.strided or copy.stride() == value.stride() or not can_be_written(value):
        return copy
    laid_out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return laid_out.copy_(value)


def can_be_written(value: Tensor) -> bool:
    """Whether no two elements share memory, without which torch refuses to write in place."""
    if is_batched(value):
        return False
    reached = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reached:
            return False
        reached += stride * (size - 1)
    return True
