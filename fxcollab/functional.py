"""A module's tensors by name, and calls with others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def call_with(
    module: nn.Module, state: Mapping[str, Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """What ``module``, which isn't changed, returns with ``state`` in the place of its parameters and buffers.

    ``state`` has any of their names; a tensor that is registered in several places is replaced in all of them.
    """
    values = {id(tensor): state[name] for name, tensor in named_tensors(module) if name in state}
    registries: Any = [registry for part in module.modules() for registry in (part._parameters, part._buffers)]
    places = [(found, name, value) for found in registries for name, value in found.items() if id(value) in values]
    try:
        for found, name, value in places:
            found[name] = values[id(value)]
        return module(*args, **(kwargs or {}))
    finally:
        for found, name, value in places:
            found[name] = value


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of ``module`` under all their names."""
    return {prefix + name: tensor for name, tensor in named_tensors(module)}


def copied_state(module: nn.Module, copy: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A copy of each parameter and buffer under all its names; a tensor with several names is copied once."""
    once = once_each(copy)
    return {name: once(tensor) for name, tensor in named_tensors(module)}


def once_each(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function``, called once for each tensor; later calls return the same result."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor, whose id must not be used again

    def found(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor, function(tensor)
        return known[id(tensor)][1]

    return found
