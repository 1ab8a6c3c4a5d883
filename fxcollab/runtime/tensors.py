"""Functions of all tensors in a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from fxcollab._torch import pytree
from fxcollab.deep_copy import deep_copy_into, parts_of_value

CARRIES_NO_GRADIENT = (
    type(None), bool, int, float, complex, str, bytes, slice, type(...),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.SymInt, torch.SymFloat, torch.SymBool,
    type,
)  # fmt: skip


def map_tensors(function: Callable[[Any], Any], value: Any, *, copy_objects: bool = False) -> Any:
    """``value``, any pytree, with ``function`` of each tensor; of an object that holds tensors, a deep copy.

    With ``copy_objects`` of any object.

    Raises:
        TypeError: an object holds modules, or holds tensors and can't be copied.
    """

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) or has_torch_function_unary(leaf):
            return function(leaf)
        return leaf if isinstance(leaf, CARRIES_NO_GRADIENT) else _object(function, leaf, copy_objects)

    return pytree.tree_map(mapped, value)


def _object(function: Callable[[Any], Any], value: Any, always: bool) -> Any:
    parts = list(parts_of_value(value))
    if not always and not any(isinstance(part, Tensor | nn.Module) for part in parts):
        return value
    try:
        if not any(isinstance(part, nn.Module) for part in parts):
            return deep_copy_into({}, value, function)[0]
        why = "it holds modules"
    except Exception as error:  # whatever its parts raise
        why = f"it can't be copied: {error}"
    raise TypeError(
        f"a value of type {type(value).__qualname__} can't cross a split: {why}\n"
        "  hint: register the type with torch.utils._pytree.register_pytree_node or register_dataclass, "
        "or put the split where a tensor crosses"
    )
