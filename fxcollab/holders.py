"""Holders: what modules keep things in from call to call, to be compared and to be gone back to.

These are their registries and attributes, and what is reached from them and can be changed in place: lists and
dictionaries, the attributes of objects, generators of random numbers, arrays. Left out are other objects of Python's
own library and of torch, and what functions close over.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Holder(NamedTuple):
    """Something that holds values and can be changed in place.

    Attributes:
        path: for people, from the module where it was found: ``cache['means']``; empty for that module's registries.
        value: a registry, a container, the attributes of an object, a generator, an array.
        module: the module where it was found.
    """

    path: str
    value: Any
    module: nn.Module | None = None

    @property
    def attribute(self) -> str:
        """The attribute of the module that it was reached from; empty for registries."""
        return re.split(r"[.[]", self.path, maxsplit=1)[0]

    def read(self) -> Any:
        """Its contents: another object, which later changes leave alone."""
        return _known(self.value).read(self.value)

    def write(self, contents: Any) -> None:
        """Replace its contents."""
        _known(self.value).write(self.value, contents)


@dataclass(frozen=True)
class Slot:
    """One entry of a registry, held by itself."""

    registry: dict[str, Any]
    name: str


class Snapshot:
    """The contents of holders at this moment.

    Attributes:
        holders: what is held.
        contents: of each, as `Holder.read` gives them.
    """

    def __init__(self, holders: Iterable[Holder]) -> None:
        self.holders = tuple(holders)
        self.contents = [holder.read() for holder in self.holders]

    def restore(self) -> None:
        """Go back to it; tensors themselves are left alone."""
        for holder, contents in zip(self.holders, self.contents, strict=True):
            holder.write(contents)

    def changed(self) -> Iterator[tuple[Holder, Any]]:
        """The holders that hold something else now, with each key or place; None for generators and arrays."""
        for holder, before in zip(self.holders, self.contents, strict=True):
            yield from ((holder, key) for key in _changed(before, holder.read()))

    def cloned(self) -> Snapshot:
        """The same with copies of tensors, except of those that have a gradient; what was one tensor stays one."""
        clones: dict[int, Tensor] = {}
        new = object.__new__(Snapshot)
        new.holders = self.holders
        with torch.no_grad():
            new.contents = [_cloned(contents, clones) for contents in self.contents]
        return new

    def with_gradients(self) -> Iterator[tuple[Holder, Any, Tensor]]:
        """The tensors that `cloned` leaves as they are, each once, with their holder and key."""
        seen: set[int] = set()
        for holder, contents in zip(self.holders, self.contents, strict=True):
            for key, value in items(contents):
                if isinstance(value, Tensor) and _has_gradient(value) and id(value) not in seen:
                    seen.add(id(value))
                    yield holder, key, value


def holders_of(modules: Iterable[nn.Module], *, own: bool = False) -> list[Holder]:
    """Everything that modules, and those in them, hold things in, each once, in a fixed order.

    Args:
        modules: the modules.
        own: leave out what every module has: the registries of its hooks and of its children.
    """
    found: dict[int, Holder] = {}
    for module in modules:
        for part in module.modules():
            _visit_module(part, found, own)
    return list(found.values())


def _visit(value: Any, module: nn.Module, path: str, found: dict[int, Holder]) -> None:
    if isinstance(value, nn.Module):
        for part in value.modules():
            _visit_module(part, found, own=False)
    elif isinstance(value, tuple | frozenset):
        _visit_inside(enumerate(value), module, (path + "[{!r}]").format, found)
    else:
        held = value if _kind(type(value)) else _attributes(value)
        if held is not None and id(held) not in found:
            found[id(held)] = Holder(path, held, module)
            _visit_inside(items(held), module, (path + ("[{!r}]" if held is value else ".{}")).format, found)


def _visit_inside(
    members: Iterable[tuple[Any, Any]], module: nn.Module, path: Callable[[Any], str], found: dict[int, Holder]
) -> None:
    for key, member in members:
        if type(member) not in PLAIN and not isinstance(member, Tensor):
            _visit(member, module, path(key), found)


def _visit_module(module: nn.Module, found: dict[int, Holder], own: bool) -> None:
    attributes = module.__dict__
    if id(attributes) in found:
        return
    registries = (module._parameters, module._buffers, *(() if own else (module._modules,)), attributes)
    for registry in registries:
        if _kind(type(registry)):  # a scripted module's are views of what it has elsewhere
            found[id(registry)] = Holder("", registry, module)
    for name, value in attributes.items():
        if type(value) not in PLAIN and not (own and name in OF_TORCH):
            _visit(value, module, name, found)


PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
"""Types of what can't be changed and holds nothing."""
OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: registries, hooks and its mode."""
_OPAQUE = frozenset((*sys.stdlib_module_names, "torch")) - {"__main__"}


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of a class of the user's or of a library."""
    if isinstance(value, type) or type(value).__module__.partition(".")[0] in _OPAQUE:
        return vars(value) if isinstance(value, SimpleNamespace) else None
    held = getattr(value, "__dict__", None)
    return held if type(held) is dict else None


@dataclass(frozen=True)
class _Kind:
    """How the contents of holders of one type are read and replaced."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(contents)


_STATE = _Kind(lambda held: held.get_state(), lambda held, to: held.set_state(to))
_KINDS: Mapping[type, _Kind] = {
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counter), _Kind(dict, _refill)),
    **dict.fromkeys((list, deque), _Kind(list, _refill)),
    set: _Kind(set, _refill),
    Slot: _Kind(lambda held: {held.name: held.registry[held.name]}, lambda held, to: held.registry.update(to)),
    torch.Generator: _STATE,
    random.Random: _Kind(lambda held: held.getstate(), lambda held, to: held.setstate(to)),
}
# By name, since numpy may be missing.
_OF_NUMPY: Mapping[str, _Kind] = {
    "ndarray": _Kind(lambda held: held.copy(), lambda held, to: held.__setitem__(..., to)),
    "RandomState": _STATE,
    "Generator": _Kind(
        lambda held: (held.bit_generator.state,), lambda held, to: setattr(held.bit_generator, "state", *to)
    ),
}


def _kind(of: type) -> _Kind | None:
    found = _KINDS.get(of)
    return _OF_NUMPY.get(of.__name__) if found is None and of.__module__.startswith("numpy") else found


def _known(value: Any) -> _Kind:
    found = _kind(type(value))
    assert found is not None
    return found


def is_held(value: Any) -> bool:
    """Whether it is, or has, a holder of its own."""
    return _kind(type(value)) is not None or _attributes(value) is not None


def items(contents: Any) -> Iterable[tuple[Any, Any]]:
    """What lies in a container, with the way to it."""
    if isinstance(contents, dict):
        return contents.items()
    return enumerate(contents) if isinstance(contents, (list, set, deque)) else ()


def _changed(before: Any, now: Any) -> Iterator[Any]:
    if isinstance(now, dict):
        missing = object()
        yield from (key for key in {**before, **now} if before.get(key, missing) is not now.get(key, missing))
    elif isinstance(now, list):
        yield from (i for i, (one, other) in enumerate(zip_longest(before, now)) if one is not other)
    elif isinstance(now, set):
        yield from before ^ now
    elif not same(before, now):
        yield None


def same(one: Any, other: Any) -> bool:
    """Whether plain values, arrays, or states of generators are equal."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    equal = one == other
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def version(tensor: Tensor) -> int:
    """How often it was written into, as far as that leaves a trace."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _has_gradient(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _cloned(contents: Any, clones: dict[int, Tensor]) -> Any:
    def clone(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(clone, value))
        if not isinstance(value, Tensor) or _has_gradient(value):
            return value
        if id(value) not in clones:
            clones[id(value)] = value.clone()
        return clones[id(value)]

    if isinstance(contents, dict):
        return {key: clone(value) for key, value in contents.items()}
    return [clone(value) for value in contents] if isinstance(contents, list) else contents
