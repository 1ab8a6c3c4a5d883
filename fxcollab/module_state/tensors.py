"""Tensors that are held: in tuples, as views of one storage, written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import storage_id, version_of


def version(tensor: Tensor) -> int:
    """How often it was written into, as far as that leaves a trace."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else version_of(tensor)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` of each tensor that it is or has in tuples; itself where there is none."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, tuple):
        return value
    members = [map_tensors(member, function) for member in value]
    if all(member is before for member, before in zip(members, value, strict=True)):
        return value
    return type(value)(*members) if hasattr(value, "_fields") else tuple(members)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that `map_tensors` finds."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def has_gradient(tensor: Tensor) -> bool:
    """Whether it is a parameter, or gradients go through it."""
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def clones(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """A copy of each by its id; views of one storage are views of one again."""
    sharing: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        strided = tensor.layout is torch.strided and type(tensor) is Tensor
        sharing.setdefault(storage_id(tensor) if strided else id(tensor), []).append(tensor)
    copies: dict[int, Tensor] = {}
    with torch.no_grad():
        for views in sharing.values():
            if len(views) == 1:
                copies[id(views[0])] = views[0].clone()
                continue
            storage = views[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
            for view in views:
                place = storage, view.storage_offset(), view.size(), view.stride()
                copies[id(view)] = torch.empty(0, dtype=view.dtype, device=view.device).set_(*place)
    return copies
