"""Siblings: the same modules with other tensors, told place by place; whatever else differs is refused."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from types import FunctionType, MethodType
from typing import Any, TypeAlias
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from fxcollab.errors import StateError
from fxcollab.held import OF_TORCH, PLAIN, Holder, holders_of, is_held, read, same
from fxcollab.runtime.fed import Fed

Owned: TypeAlias = Mapping[str, Any]

IN_TURN = "use the graph whose branches run one after the other"


@dataclass(frozen=True, eq=False)
class Sibling:
    """One of the branches that run as one.

    Attributes:
        owned: its modules and tensors, by their names in the branch's function.
        registries: the dictionaries in which its modules have tensors: parameters, buffers and attributes.
        others: what its modules hold things in beside.
    """

    owned: Owned
    registries: Sequence[Holder]
    others: Sequence[Holder]


def siblings_of(owned: Sequence[Owned]) -> list[Sibling]:
    """Siblings whose registries and other holders agree one by one.

    A compiler can't look everywhere: under it modules have their parameters, buffers, numbers and texts alone.

    Raises:
        StateError: they differ in more than the values of tensors, or have hooks.
    """
    siblings = [_sibling(own) for own in owned]
    for sibling in siblings:
        _refuse_hooks(sibling)
    for other in siblings[1:]:
        _refuse_unlike(siblings[0], other)
    return siblings


def _sibling(own: Owned) -> Sibling:
    modules = [
        value.module if isinstance(value, Fed) else value for value in own.values() if isinstance(value, nn.Module)
    ]
    if not torch.compiler.is_compiling():
        holders = holders_of(modules, own=True)
        return Sibling(own, [held for held in holders if not held.path], [held for held in holders if held.path])
    parts = [part for module in modules for part in module.modules()]
    registries = [Holder("", registry, part) for part in parts for registry in (part._parameters, part._buffers)]
    return Sibling(own, registries, [Holder("", numbers_of(part), part) for part in parts])


def numbers_of(module: nn.Module) -> dict[str, Any]:
    """What a module has in attributes that a compiler can compare, its mode among it.

    Raises:
        StateError: it has tensors there.
    """
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):
            raise unlike(
                f"{type(module).__qualname__}.{name} is no buffer: a compiler would take the first one's for all",
                hint=f"register it with register_buffer, or {IN_TURN}",
            )
    return {name: value for name, value in module.__dict__.items() if type(value) in _NUMBERS}


_NUMBERS = frozenset((type(None), bool, int, float, str))


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _refuse_hooks(sibling: Sibling) -> None:
    if any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS):
        raise unlike("hooks of all modules would see the tensors of all of them in one")
    for module in dict.fromkeys(holder.module for holder in sibling.registries):
        if isinstance(module, _EMBEDDINGS) and module.sparse:
            raise unlike("vmap knows no sparse gradients", at=(sibling, module, "sparse"))
        for name in _HOOKS:
            hooks = getattr(module, name)
            if hooks and not all(map(is_of_torch, hooks.values())):
                raise unlike("it would see the tensors of all of them in one", at=(sibling, module, name))


def _refuse_unlike(first: Sibling, other: Sibling) -> None:
    here, there = ([*sibling.registries, *sibling.others] for sibling in (first, other))
    for one, held in zip_longest(here, there):
        if one is None or held is None or (one.path, type(one.module)) != (held.path, type(held.module)):
            sibling, shown = (other, held) if one is None else (first, one)
            raise unlike(
                "siblings have modules of different types, or hold different things",
                at=(sibling, shown.module, shown.path),
            )
        for name, value, theirs in _differences(one, held):
            raise _differing(value, theirs, (first, one.module, ".".join(filter(None, (one.path, name)))))


# Compilers can't read unions.
_CONTAINERS, _BY_IDENTITY, _BY_THEMSELVES = (dict, list), (Tensor, FunctionType), (nn.Module, ReferenceType)
_OF_EVERY_MODULE = OF_TORCH - {"training"}


def _differences(one: Holder, other: Holder) -> Iterator[tuple[str, Any, Any]]:
    """The keys or places at which two holders have different contents, and what they have there."""
    registered = not one.path
    here, there = (held.value if registered else read(held.value) for held in (one, other))
    if not isinstance(here, _CONTAINERS):
        if not same(here, there):
            yield "", here, there
        return
    if isinstance(here, list):
        here, there = (dict(enumerate(held)) for held in (here, there))
    for key in here if here.keys() == there.keys() else {**here, **there}:
        if registered and key in _OF_EVERY_MODULE:
            continue
        mine, theirs = here.get(key), there.get(key)
        if mine is theirs or (registered and isinstance(mine, Tensor) and isinstance(theirs, Tensor)):
            continue
        if not _alike(mine, theirs):
            yield str(key), mine, theirs


def _alike(one: Any, other: Any) -> bool:
    """Whether two values compute the same; holders in them are compared by themselves."""
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, _BY_IDENTITY):
        return False
    if type(one) in PLAIN:
        return same(one, other)
    if isinstance(one, _BY_THEMSELVES) or is_held(one):
        return True
    if isinstance(one, MethodType):
        return one.__func__ is other.__func__ and _alike(one.__self__, other.__self__)
    if isinstance(one, partial):
        return _alike((one.func, one.args, *one.keywords.items()), (other.func, other.args, *other.keywords.items()))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if is_of_torch(one) and hasattr(one, "__dict__"):
        return _alike(tuple(vars(one).items()), tuple(vars(other).items()))
    return same(one, other)


def is_of_torch(value: Any) -> bool:
    """Whether it, or its type, is torch's own."""
    return (getattr(value, "__module__", None) or type(value).__module__).partition(".")[0] == "torch"


Spot: TypeAlias = tuple[Sibling, nn.Module, str]
"""A sibling, a module in it, and what that has."""


def unlike(why: str, *, at: Spot | None = None, hint: str = IN_TURN) -> StateError:
    """The refusal of branches that can't be run as one."""
    return StateError("Branches can't be run as one.", where=_named(*at) if at else None, why=why, hint=hint)


def _differing(one: Any, other: Any, at: Spot) -> StateError:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return unlike(
            "tensors are held there, each sibling's own", at=at, hint=f"register them as buffers, or {IN_TURN}"
        )
    return unlike(f"it is {_shown(one)} in one and {_shown(other)} in another", at=at)


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else reprlib.repr(value)


def _named(sibling: Sibling, module: nn.Module, name: str) -> str:
    """The way to something by names in the branch's function; by its type under a compiler."""
    path = type(module).__qualname__
    if not torch.compiler.is_compiling():
        for own, value in sibling.owned.items():
            inner = value.module if isinstance(value, Fed) else value
            parts = inner.named_modules(prefix=own) if isinstance(inner, nn.Module) else ()
            path = next((found for found, part in parts if part is module), path)
    return f"{path}.{name}" if name else path
