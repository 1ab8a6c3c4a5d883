"""Batched: siblings run as one, by `torch.vmap` over their stacked weights.

State stays where it is. For the time of a call the tensors of all siblings are stacked and stand in the first one's
modules; what the call writes into them goes back to each sibling's own, and gradients come back through the stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from fxcollab.errors import StateError
from fxcollab.runtime.fed import Fed

Branch: TypeAlias = Callable[..., tuple[Any, ...]]
Owned: TypeAlias = Mapping[str, Any]
Column: TypeAlias = tuple[Any, ...]
Place: TypeAlias = tuple[dict[str, Any], str]


def batched(branch: Branch, owned: Sequence[Owned], inputs: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    """What ``branch`` returns for every sibling, run as one: to rounding the same as one after the other.

    Random operations draw for each sibling, though not the numbers that they would draw one after the other. Where
    the model is exported or traced, siblings do run in turn; under autocast on a CPU too, since it does not
    cast what `torch.vmap` makes of a convolution.

    Args:
        branch: a function of a namespace and of inputs that returns a tuple.
        owned: for each sibling, its modules and tensors by their names in the namespace.
        inputs: for each sibling, tensors and other values; what all have in common is not stacked.

    Raises:
        StateError: the siblings differ in more than the values of tensors, or these are sharded.
    """
    siblings = None if _must_take_turns(owned, inputs) else _siblings(owned, inputs)
    if siblings is None or not siblings.mapped:
        return tuple(branch(_Own(own), *values) for own, values in zip(owned, inputs, strict=True))
    stacks = [_stack(siblings.columns[position]) for position in siblings.mapped]
    leaves, spec, replaced = _as_one(branch, siblings, stacks)
    _write_back(siblings, dict(zip(siblings.mapped, stacks, strict=True)) | replaced)
    several = [leaf.unbind() if isinstance(leaf, Tensor) else [leaf] * len(owned) for leaf in leaves]
    return tuple(pytree.tree_unflatten(list(one), spec) for one in zip(*several, strict=True))


batched.__module__ = "fxcollab"


class _Own:
    """What a sibling owns, as attributes; the compiler knows no ``SimpleNamespace``."""

    def __init__(self, owned: Owned) -> None:
        for name, value in owned.items():
            setattr(self, name, value)


@dataclass(frozen=True, eq=False)
class _Siblings:
    """What siblings have at the same places.

    Attributes:
        owned: what each of them has, by name.
        places: for each, where the tensors of its modules are registered.
        tensors: names of the plain tensors that they own.
        columns: of each place, of each such name and of each leaf of the inputs, the value in every sibling.
        spec: of the inputs.
        mapped: positions of the columns that differ.
    """

    owned: Sequence[Owned]
    places: Sequence[Sequence[Place]]
    tensors: Sequence[str]
    columns: Sequence[Column]
    spec: pytree.TreeSpec
    mapped: Sequence[int]


def _siblings(owned: Sequence[Owned], inputs: Sequence[Sequence[Any]]) -> _Siblings:
    modules = [[value for value in own.values() if isinstance(value, nn.Module)] for own in owned]
    _refuse_different_modes(modules)
    places = [list(_places(own)) for own in modules]
    tensors = [name for name, value in owned[0].items() if isinstance(value, Tensor)]
    leaves, specs = zip(*(pytree.tree_flatten(list(values)) for values in inputs), strict=True)
    columns: list[Column] = [
        *(tuple(registry[name] for registry, name in column) for column in _columns(places)),
        *(tuple(own[name] for own in owned) for name in tensors),
        *_columns(leaves),
    ]
    mapped = [position for position, column in enumerate(columns) if _differs(column)]
    return _Siblings(owned, places, tensors, columns, specs[0], mapped)


def _columns(rows: Sequence[Sequence[Any]]) -> Iterator[Column]:
    if len({len(row) for row in rows}) > 1:
        raise _unlike("one has more tensors than another")
    return zip(*rows, strict=True)


def _as_one(
    branch: Branch, siblings: _Siblings, stacks: Sequence[Tensor]
) -> tuple[list[Any], pytree.TreeSpec, dict[int, Tensor]]:
    """Leaves of the results, tensors stacked; how they are nested; and what took another's place in a registry."""
    held = len(siblings.places[0])
    read = held + len(siblings.tensors)
    found: list[Any] = []  # what vmap can't hand out

    def one(*slices: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        values = [column[0] for column in siblings.columns]
        for position, value in zip(siblings.mapped, slices, strict=True):
            values[position] = value
        namespace = _Own({**siblings.owned[0], **dict(zip(siblings.tensors, values[held:read], strict=True))})
        with _standing_in(siblings.places[0], values[:held]) as now:
            results = branch(namespace, *pytree.tree_unflatten(values[read:], siblings.spec))
        leaves, spec = pytree.tree_flatten(results)
        replaced = [position for position in range(held) if now[position] is not values[position]]
        found[:] = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], spec, replaced
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)], [now[position] for position in replaced]

    results, new = torch.vmap(one, randomness="different")(*stacks)
    plain, spec, replaced = found
    tensors = iter(results)
    return [leaf[0] if leaf else next(tensors) for leaf in plain], spec, dict(zip(replaced, new, strict=True))


@contextmanager
def _standing_in(places: Sequence[Place], values: Sequence[Any]) -> Iterator[list[Any]]:
    """``values`` registered at ``places`` for a while; the list holds afterwards what stood there at the end."""
    before = [registry[name] for registry, name in places]
    now: list[Any] = []
    try:
        for (registry, name), value in zip(places, values, strict=True):
            registry[name] = value
        yield now
    finally:
        now[:] = [registry[name] for registry, name in places]
        for (registry, name), value in zip(places, before, strict=True):
            registry[name] = value


def _write_back(siblings: _Siblings, stacks: Mapping[int, Tensor]) -> None:
    """Into each sibling's own buffers what their stack holds now: batch_norm writes without a trace."""
    own = len(siblings.places[0]) + len(siblings.tensors)
    buffers: list[Tensor] = []
    values: list[Tensor] = []
    for position, stack in stacks.items():
        if position < own and not isinstance(siblings.columns[position][0], nn.Parameter):
            buffers += siblings.columns[position]
            values += stack.unbind()
    if buffers:
        with torch.no_grad():
            torch._foreach_copy_(buffers, values)


def _places(modules: Iterable[nn.Module]) -> Iterator[Place]:
    """Where the modules' parameters and buffers are registered, each place once."""
    seen: set[tuple[int, str]] = set()
    for module in modules:
        for part in (module.module if isinstance(module, Fed) else module).modules():
            for registry in (part._parameters, part._buffers):
                for name, tensor in registry.items():
                    if tensor is not None and (id(registry), name) not in seen:
                        seen.add((id(registry), name))
                        yield registry, name


def _differs(column: Column) -> bool:
    """Whether siblings have different tensors there; what is no tensor must be the same."""
    first = column[0]
    if isinstance(first, Tensor):
        return any(value is not first for value in column)
    if any(value is not first and value != first for value in column):
        raise _unlike(f"one reads {first!r} where others read {', '.join(map(repr, column[1:]))}")
    return False


def _stack(column: Column) -> Tensor:
    kinds = {(type(value).__name__, value.shape, value.dtype, value.device) for value in column}
    if len(kinds) > 1:
        raise _unlike(f"tensors differ: {', '.join(sorted(map(str, kinds)))}")
    if type(column[0]).__name__ == "DTensor":
        raise _unlike(
            "their tensors are sharded", "shard (fully_shard) the graph whose branches run one after the other"
        )
    return torch.stack(column)


def _refuse_different_modes(modules: Sequence[Sequence[nn.Module]]) -> None:
    modes = {tuple(part.training for module in own for part in module.modules()) for own in modules}
    if len(modes) > 1:
        raise _unlike("a module is in train mode in one and in eval mode in another")


def _unlike(why: str, hint: str = "use the graph whose branches run one after the other") -> StateError:
    return StateError("Branches can't be run as one.", why=why, hint=hint)


def _must_take_turns(owned: Sequence[Owned], inputs: Sequence[Sequence[Any]]) -> bool:
    """Whether what runs is recorded operation by operation, for elsewhere, or autocast would be lost."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch.compiler.is_compiling():
        return False
    if get_proxy_mode() is not None or torch.is_autocast_enabled("cpu"):
        return True
    leaves = pytree.tree_leaves(([list(own.values()) for own in owned], list(inputs)))
    return any(isinstance(leaf, fx.Proxy) for leaf in leaves)
