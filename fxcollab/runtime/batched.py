"""Batched: siblings run as one, by `torch.vmap` over their stacked weights.

State stays where it is. For the time of a call the tensors of all siblings are stacked and stand in the first one's
modules; what the call writes into them goes back to each sibling's own, and gradients come back through the stacks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from fxcollab.errors import StateError
from fxcollab.runtime.fed import Fed
from fxcollab.runtime.rescale import CARRIES_NO_GRADIENT

Branch: TypeAlias = Callable[..., tuple[Any, ...]]
Owned: TypeAlias = Mapping[str, Any]
Column: TypeAlias = tuple[Any, ...]
Registry: TypeAlias = dict[str, Any]
Place: TypeAlias = tuple[int, str]


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
    if siblings is None or not siblings.stacked:
        return tuple(branch(_Own(own), *values) for own, values in zip(owned, inputs, strict=True))
    stacks = [_stack(column) for column in siblings.stacked]
    versions = [_version(stack) for stack in stacks]
    outcomes = _as_one(branch, siblings, stacks)
    changed = [_version(stack) != version for stack, version in zip(stacks, versions, strict=True)]
    _write_back(siblings, stacks, changed)
    _assign(siblings, [assigned for _, assigned in outcomes])
    return tuple(results for results, _ in outcomes)


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
        registries: for each, the dictionaries in which its modules hold tensors: parameters, buffers and attributes.
        places: of every tensor there: the position of the registry, and the name in it.
        tensors: names of the plain tensors that they own.
        columns: of each place, of each such name and of each leaf of the inputs, the value in every sibling.
        spec: of the inputs.
        stacked: the columns that differ, once each.
        indices: for each column, which of these it is; None where all siblings have the same.
        buffers: which of these are registered buffers.
    """

    owned: Sequence[Owned]
    registries: Sequence[Sequence[Registry]]
    places: Sequence[Place]
    tensors: Sequence[str]
    columns: Sequence[Column]
    spec: pytree.TreeSpec
    stacked: Sequence[Column]
    indices: Sequence[int | None]
    buffers: frozenset[int]


def _siblings(owned: Sequence[Owned], inputs: Sequence[Sequence[Any]]) -> _Siblings:
    parts = [list(_parts(own)) for own in owned]
    _refuse_unlike(parts)
    registries = [[registry for part in own for registry in _registries(part)] for own in parts]
    places = [(i, name) for i, held in enumerate(registries[0]) for name in held if isinstance(held[name], Tensor)]
    tensors = [name for name, value in owned[0].items() if isinstance(value, Tensor)]
    leaves, specs = zip(*(pytree.tree_flatten(list(values)) for values in inputs), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise _unlike("they read values of different structure")
    columns: list[Column] = [
        *(tuple(own[position].get(name) for own in registries) for position, name in places),
        *(tuple(own[name] for own in owned) for name in tensors),
        *zip(*leaves, strict=True),
    ]
    order: dict[tuple[int, ...], int] = {}
    stacked: list[Column] = []
    indices: list[int | None] = []
    for column in columns:
        key = tuple(map(id, column))
        if _differs(column) and key not in order:
            order[key] = len(stacked)
            stacked.append(column)
        indices.append(order.get(key))
    held = {id(part._buffers) for part in parts[0]}
    buffers = (indices[i] for i, (position, _) in enumerate(places) if id(registries[0][position]) in held)
    return _Siblings(
        owned,
        registries,
        places,
        tensors,
        columns,
        specs[0],
        stacked,
        indices,
        frozenset(index for index in buffers if index is not None),
    )


def _parts(own: Owned) -> dict[nn.Module, None]:
    """The modules of one sibling, those inside of others too."""
    modules = (value for value in own.values() if isinstance(value, nn.Module))
    inner = (module.module if isinstance(module, Fed) else module for module in modules)
    return dict.fromkeys(part for module in inner for part in module.modules())


def _registries(part: nn.Module) -> tuple[Registry, ...]:
    registered: tuple[Registry, ...] = (part._parameters, part._buffers)
    return registered if torch.compiler.is_compiling() else (*registered, part.__dict__)


def _as_one(
    branch: Branch, siblings: _Siblings, stacks: Sequence[Tensor]
) -> list[tuple[tuple[Any, ...], dict[Place, Any]]]:
    """For each sibling what the branch returns, and what it puts into its modules' registries anew."""
    held = len(siblings.places)
    read = held + len(siblings.tensors)
    found: list[Any] = []  # what vmap can't hand out

    def one(*slices: Tensor) -> list[Tensor]:
        values = [
            column[0] if index is None else slices[index]
            for column, index in zip(siblings.columns, siblings.indices, strict=True)
        ]
        namespace = _Own({**siblings.owned[0], **dict(zip(siblings.tensors, values[held:read], strict=True))})
        with _standing_in(siblings.registries[0], siblings.places, values[:held]) as assigned:
            results = branch(namespace, *pytree.tree_unflatten(values[read:], siblings.spec))
        leaves, spec = pytree.tree_flatten((results, assigned))
        found[:] = [None if isinstance(leaf, Tensor) else (_plain(leaf),) for leaf in leaves], spec
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    try:
        results = torch.vmap(one, randomness="different")(*stacks)
    except RuntimeError as error:
        if "vmap" in str(error) or "Batching rule" in str(error):
            raise _unlike(str(error).partition(_NEWLINE)[0]) from error
        raise
    plain, spec = found
    tensors = (result.unbind() for result in results)
    several = [[leaf[0]] * len(siblings.owned) if leaf else next(tensors) for leaf in plain]
    return [pytree.tree_unflatten(list(leaves), spec) for leaves in zip(*several, strict=True)]


@contextmanager
def _standing_in(
    registries: Sequence[Registry], places: Sequence[Place], values: Sequence[Any]
) -> Iterator[dict[Place, Any]]:
    """``values`` at ``places`` for a while; what is yielded holds afterwards what was put into registries anew."""
    before = [dict(registry) for registry in registries]
    assigned: dict[Place, Any] = {}
    try:
        for (position, name), value in zip(places, values, strict=True):
            registries[position][name] = value
        entered = [dict(registry) for registry in registries]
        yield assigned
        for position, (registry, old) in enumerate(zip(registries, entered, strict=True)):
            for name, value in registry.items():
                if name not in old or old[name] is not value:
                    assigned[position, name] = value
    finally:
        for registry, old in zip(registries, before, strict=True):
            for name in [name for name in registry if name not in old]:
                del registry[name]
            registry.update(old)


def _write_back(siblings: _Siblings, stacks: Sequence[Tensor], changed: Sequence[bool]) -> None:
    """Into each sibling's own tensors what their stack holds now; batch_norm writes into buffers without a trace."""
    own = {index for index in siblings.indices[: len(siblings.places) + len(siblings.tensors)] if index is not None}
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for index in sorted(own):
        if changed[index] or index in siblings.buffers:
            targets += siblings.stacked[index]
            values += stacks[index].unbind()
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, values)


def _assign(siblings: _Siblings, assigned: Sequence[Mapping[Place, Any]]) -> None:
    """Put what a forward assigned into every sibling's own registries."""
    for place in assigned[0]:
        position, name = place
        if not isinstance(assigned[0][place], Tensor):
            _differs(tuple(own[position].get(name) for own in siblings.registries))
        for own, values in zip(siblings.registries, assigned, strict=True):
            own[position][name] = values[place]


_NEWLINE = "\n"


def _differs(column: Column) -> bool:
    """Whether siblings have different tensors there; what is no tensor must be the same."""
    first = column[0]
    if all(isinstance(value, Tensor) for value in column):
        return any(value is not first for value in column)
    if any(value is not first and value != first for value in column):
        raise _unlike(f"one has {first!r} where others have {', '.join(map(repr, column[1:]))}")
    return False


def _stack(column: Column) -> Tensor:
    kinds = {(value.dtype, value.device, tuple(value.shape)) for value in column}
    if len(kinds) > 1:
        raise _unlike(f"their tensors differ: {', '.join(sorted(map(str, kinds)))}")
    if any(type(value).__name__ == "DTensor" for value in column):
        raise _unlike("their tensors are sharded")
    return torch.stack(column)


def _version(stack: Tensor) -> int:
    """How often it was written into, as far as that leaves a trace."""
    return 0 if torch.compiler.is_compiling() or stack.is_inference() else stack._version


def _plain(leaf: Any) -> Any:
    """What has no tensors inside that would stay those of all siblings."""
    if isinstance(leaf, (*CARRIES_NO_GRADIENT, torch.Size)):
        return leaf
    raise _unlike(
        f"a value of type {type(leaf).__qualname__} leaves a branch, and may hide tensors",
        "register the type with torch.utils._pytree.register_pytree_node",
    )


def _refuse_unlike(parts: Sequence[Sequence[nn.Module]]) -> None:
    if len({tuple(map(type, own)) for own in parts}) > 1:
        raise _unlike("their modules are of different types")
    for several in zip(*parts, strict=True):
        first = _attributes(several[0])
        for part in several[1:]:
            other = _attributes(part)
            if first != other:
                name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
                raise _unlike(
                    f"the attribute {name} is {first.get(name)!r} in one {type(part).__qualname__} "
                    f"and {other.get(name)!r} in another"
                )


_PLAIN = frozenset((type(None), bool, int, float, str))
_CONTAINERS = frozenset((tuple, list, dict))
_REGISTRIES = frozenset(nn.Module().__dict__) - {"training"}


def _attributes(part: nn.Module) -> dict[str, Any]:
    """What a module has in attributes and that decides what it computes: numbers, its mode, how many hooks."""
    found = {}
    for name, value in part.__dict__.items():
        kind = type(value)
        if kind in _PLAIN:
            found[name] = value
        elif kind is OrderedDict:
            found[name] = len(value)
        elif kind in _CONTAINERS and name not in _REGISTRIES:
            if _PLAIN.issuperset(map(type, value.values() if kind is dict else value)):
                found[name] = value
            elif any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                raise _unlike(
                    f"{type(part).__qualname__}.{name} holds tensors, each sibling its own",
                    "register them as buffers, or use the graph whose branches run one after the other",
                )
    return found


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
