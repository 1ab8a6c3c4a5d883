"""Tensors among the values that modules hold: found, replaced and cloned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import storage_id, version_of


def version(tensor: Tensor) -> int:
    """The tensor's version counter; 0 where there is none to read, as of inference tensors."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else version_of(tensor)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to a tensor, or to the tensors in nested tuples; any other value is returned as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, tuple):
        return value
    members = [map_tensors(member, function) for member in value]
    if all(member is before for member, before in zip(members, value, strict=True)):
        return value
    return type(value)(*members) if hasattr(value, "_fields") else tuple(members)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors to which `map_tensors` applies its function."""
    if isinstance(value, tuple):
        return [tensor for member in value for tensor in tensors_in(member)]
    return [value] if isinstance(value, Tensor) else []


def has_gradient(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter or requires a gradient."""
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def clones(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """A clone of each tensor, by the id of the original; clones of views of one storage share one as well."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        strided = tensor.layout is torch.strided and type(tensor) is Tensor
        by_storage.setdefault(storage_id(tensor) if strided else id(tensor), []).append(tensor)
    copies: dict[int, Tensor] = {}
    with torch.no_grad():
        for views in by_storage.values():
            if len(views) == 1:
                copies[id(views[0])] = views[0].clone()
                continue
            storage = views[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
            for view in views:
                layout = storage, view.storage_offset(), view.size(), view.stride()
                copies[id(view)] = torch.empty(0, dtype=view.dtype, device=view.device).set_(*layout)
    return copies
