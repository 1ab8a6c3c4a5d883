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

from fxcollab.held import Holder, version
from fxcollab.runtime.compiled import whole
from fxcollab.runtime.copying import can_be_written
from fxcollab.runtime.rescale import CARRIES_NO_GRADIENT
from fxcollab.runtime.siblings import Owned, Sibling, is_of_torch, siblings_of, unlike
from fxcollab.runtime.watched import watched

Branch: TypeAlias = Callable[..., tuple[Any, ...]]
Column: TypeAlias = tuple[Any, ...]
Place: TypeAlias = tuple[int, str]


@whole
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
        StateError: the siblings differ in more than the values of tensors, these are sharded, or the branch does what
            can't be done for all at once.
    """
    if _must_take_turns(owned, inputs):
        return _in_turn(branch, owned, inputs)
    table = _tabulate(siblings_of(owned), inputs)
    if not table.stacked:
        return _in_turn(branch, owned, inputs)
    _refuse_other_promotion(table)
    stacks = [_stack(column) for column in table.stacked]
    shared = [(tensor, version(tensor)) for tensor in _shared_buffers(table)]
    versions = [version(stack) for stack in stacks]
    outcomes = _as_one(branch, table, stacks)
    changed = [version(stack) != before for stack, before in zip(stacks, versions, strict=True)]
    assigned = [found for _, found in outcomes]
    if any(version(tensor) != before for tensor, before in shared):
        raise unlike("a buffer is written that they share: once for all of them")
    _refuse_assigned(table, assigned[0])
    _write_back(table, stacks, changed)
    _assign(table, assigned)
    return tuple(results for results, _ in outcomes)


batched.__module__ = "fxcollab"


class _Own:
    """What a sibling owns, as attributes; the compiler knows no ``SimpleNamespace``."""

    def __init__(self, owned: Owned) -> None:
        for name, value in owned.items():
            setattr(self, name, value)


def _in_turn(branch: Branch, owned: Sequence[Owned], inputs: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(branch(_Own(own), *values) for own, values in zip(owned, inputs, strict=True))


@dataclass(frozen=True, eq=False)
class _Table:
    """What siblings have at the same places.

    Attributes:
        siblings: the siblings.
        places: of every tensor in their registries: the position of the registry, and the name in it.
        tensors: names of the plain tensors that they own.
        columns: of each place, of each such name and of each leaf of the inputs, the value in every sibling.
        spec: of the inputs.
        stacked: the columns that differ, once each.
        indices: for each column, which of these it is; None where all siblings have the same.
    """

    siblings: Sequence[Sibling]
    places: Sequence[Place]
    tensors: Sequence[str]
    columns: Sequence[Column]
    spec: pytree.TreeSpec
    stacked: Sequence[Column]
    indices: Sequence[int | None]


def _tabulate(siblings: Sequence[Sibling], inputs: Sequence[Sequence[Any]]) -> _Table:
    first = siblings[0]
    places = [(i, name) for i, held in enumerate(first.registries) for name in _tensors(held.value)]
    tensors = _tensors(first.owned)
    leaves, specs = zip(*(pytree.tree_flatten(list(values)) for values in inputs), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise unlike("they read values of different structure")
    columns: list[Column] = [
        *(tuple(sibling.registries[position].value[name] for sibling in siblings) for position, name in places),
        *(tuple(sibling.owned[name] for sibling in siblings) for name in tensors),
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
    return _Table(siblings, places, tensors, columns, specs[0], stacked, indices)


def _tensors(held: Mapping[str, Any]) -> list[str]:
    return [name for name, value in held.items() if isinstance(value, Tensor)]


def _differs(column: Column) -> bool:
    """Whether siblings have different tensors there; what is no tensor must be the same."""
    first = column[0]
    if all(isinstance(value, Tensor) for value in column):
        return any(value is not first for value in column)
    if any(value is not first and value != first for value in column):
        raise unlike("they read different values that are no tensors")
    return False


def _stack(column: Column) -> Tensor:
    kinds = {(value.dtype, value.device, tuple(value.shape)) for value in column}
    if len(kinds) > 1:
        raise unlike(f"their tensors differ: {', '.join(sorted(map(str, kinds)))}")
    if any(type(value).__name__ == "DTensor" for value in column):
        raise unlike("their tensors are sharded")
    return torch.stack(column)


def _refuse_other_promotion(table: _Table) -> None:
    """A stack of numbers has a dimension, and decides of types with others as a number doesn't."""
    kinds = {column[0].dtype for column in table.stacked if column[0].dim() and column[0].is_floating_point()}
    for column in table.stacked:
        if kinds and not column[0].dim() and column[0].is_floating_point() and column[0].dtype not in kinds:
            raise unlike(f"a number of {column[0].dtype} among other types would make results of its own type")


def _shared_buffers(table: _Table) -> Iterator[Tensor]:
    """What all siblings have in common and none should write, parameters aside."""
    for column, index in zip(table.columns[: len(table.places)], table.indices, strict=False):
        if index is None and isinstance(column[0], Tensor) and not isinstance(column[0], nn.Parameter):
            yield column[0]


def _as_one(
    branch: Branch, table: _Table, stacks: Sequence[Tensor]
) -> list[tuple[tuple[Any, ...], dict[Place, Any]]]:
    """For each sibling what the branch returns, and what it puts into its modules' registries anew."""
    first = table.siblings[0]
    held = len(table.places)
    read = held + len(table.tensors)
    padded = _padded(table)
    found: list[Any] = []  # what vmap can't hand out

    def one(*slices: Tensor) -> list[Tensor]:
        values = [
            column[0] if index is None else slices[index]
            for column, index in zip(table.columns, table.indices, strict=True)
        ]
        for column, (_, row) in padded.items():
            values[column] = _without_gradient_of(row, values[column])
        namespace = _Own({**first.owned, **dict(zip(table.tensors, values[held:read], strict=True))})
        with _standing_in(first, table.places, values[:held]) as assigned:
            results = branch(namespace, *pytree.tree_unflatten(values[read:], table.spec))
        leaves, spec = pytree.tree_flatten((results, assigned))
        found[:] = [None if isinstance(leaf, Tensor) else (_plain(leaf),) for leaf in leaves], spec
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    with watched(first), _without_padding(padded.values()):
        results = torch.vmap(one, randomness="different")(*stacks)
    plain, spec = found
    tensors = (result.unbind() for result in results)
    several = [[leaf[0]] * len(table.siblings) if leaf else next(tensors) for leaf in plain]
    return [pytree.tree_unflatten(list(leaves), spec) for leaves in zip(*several, strict=True)]


@contextmanager
def _standing_in(sibling: Sibling, places: Sequence[Place], values: Sequence[Any]) -> Iterator[dict[Place, Any]]:
    """``values`` at ``places`` for a while; what is yielded holds afterwards what was put into registries anew."""
    registries = [holder.value for holder in sibling.registries]
    before = [dict(registry) for registry in registries]
    assigned: dict[Place, Any] = {}
    try:
        for (position, name), value in zip(places, values, strict=True):
            registries[position][name] = value
        entered = [dict(registry) for registry in registries]
        yield assigned
        for position, (registry, old) in enumerate(zip(registries, entered, strict=True)):
            if any(name not in registry for name in old):
                raise unlike("the forward deletes attributes", at=(sibling, sibling.registries[position].module, ""))
            for name, value in registry.items():
                if name not in old or old[name] is not value:
                    assigned[position, name] = value
    finally:
        for registry, old in zip(registries, before, strict=True):
            for name in [name for name in registry if name not in old]:
                del registry[name]
            registry.update(old)


def _padded(table: _Table) -> dict[int, tuple[nn.Embedding, int]]:
    """The columns of embeddings with a padding index, which vmap would look for in the first sibling alone."""
    found = {}
    for column, (position, name) in enumerate(table.places):
        module = table.siblings[0].registries[position].module
        if isinstance(module, nn.Embedding) and name == "weight" and module.padding_idx is not None:
            found[column] = module, module.padding_idx
    return found


def _without_gradient_of(row: int, weight: Tensor) -> Tensor:
    is_row = torch.arange(weight.shape[0], device=weight.device) == row % weight.shape[0]
    return torch.where(is_row.unsqueeze(1), weight.detach(), weight)


@contextmanager
def _without_padding(embeddings: Iterable[tuple[nn.Embedding, int]]) -> Iterator[None]:
    try:
        for embedding, _ in embeddings:
            embedding.padding_idx = None
        yield
    finally:
        for embedding, row in embeddings:
            embedding.padding_idx = row


def _write_back(table: _Table, stacks: Sequence[Tensor], changed: Sequence[bool]) -> None:
    """Into each sibling's own tensors what their stack holds now; batch_norm writes into buffers without a trace."""
    unseen = {
        index
        for (position, name), index in zip(table.places, table.indices, strict=False)
        if _may_write_unseen(table.siblings[0].registries[position], name)
    }
    own = {index for index in table.indices[: len(table.places) + len(table.tensors)] if index is not None}
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for index in sorted(own):
        column = table.stacked[index]
        if changed[index] or (index in unseen and all(map(can_be_written, column))):
            targets += column
            values += stacks[index].unbind()
    if targets:
        _refuse_views(targets, table)
        with torch.no_grad():
            torch._foreach_copy_(targets, values)


def _may_write_unseen(registry: Holder, name: str) -> bool:
    """Whether a tensor may be written although its version doesn't tell, as batch_norm does."""
    module, tensor = registry.module, registry.value[name]
    if is_of_torch(module):
        return module.training and registry.value is module._buffers
    return bool(torch.compiler.is_compiling() or tensor.is_floating_point()) and not tensor.requires_grad


def _refuse_views(written: Sequence[Tensor], table: _Table) -> None:
    """Two tensors over one storage are two stacks, of which one would not see what is written into the other."""
    if torch.compiler.is_compiling():
        return
    storages = {tensor.untyped_storage()._cdata for tensor in written}
    ids = set(map(id, written))
    for column in table.stacked:
        for tensor in column:
            if id(tensor) not in ids and tensor.untyped_storage()._cdata in storages:
                raise unlike("tensors are written that are views of one another")
    if len(storages) < len(written):
        raise unlike("tensors are written that are views of one another")


def _refuse_assigned(table: _Table, assigned: Mapping[Place, Any]) -> None:
    """What a forward puts into registries anew must be each sibling's own, and no parameter or container."""
    for position, name in assigned:
        registries = [sibling.registries[position] for sibling in table.siblings]
        module = registries[0].module
        at = table.siblings[0], module, name
        if len({id(registry.value) for registry in registries}) < len(registries):
            raise unlike("they share a module that each would set anew", at=at)
        if registries[0].value is module._parameters:
            raise unlike("the forward registers a parameter anew", at=at)
        if name not in module._buffers and _tensors_inside(assigned[position, name]):
            raise unlike("the forward sets a container of tensors", at=at)


def _tensors_inside(value: Any) -> bool:
    return not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _assign(table: _Table, assigned: Sequence[Mapping[Place, Any]]) -> None:
    """Put what a forward assigned into every sibling's own registries."""
    for sibling, values in zip(table.siblings, assigned, strict=True):
        for (position, name), value in values.items():  # tensors are views of what all siblings got
            sibling.registries[position].value[name] = value.clone() if isinstance(value, Tensor) else value


def _plain(leaf: Any) -> Any:
    """What has no tensors inside that would stay those of all siblings."""
    if isinstance(leaf, (*CARRIES_NO_GRADIENT, torch.Size)):
        return leaf
    raise unlike(
        f"a value of type {type(leaf).__qualname__} leaves a branch, and may hide tensors",
        hint="register the type with torch.utils._pytree.register_pytree_node",
    )


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
