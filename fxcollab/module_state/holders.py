"""Holders: what modules keep things in from call to call.

These are their registries, attributes and classes, and what is reached from them and can be changed in place: lists
and dictionaries, objects, generators of random numbers, arrays. Left out are other objects of Python's own library
(files, locks, iterators) and of torch (scripted modules), globals, and what functions close over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxcollab.module_state.classes import classes_of, is_opaque, slots_of
from fxcollab.module_state.contents import Slots, class_attributes, is_container, items, read

OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: registries, hooks and its mode."""
PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
"""Types of what can't be changed and holds nothing."""

_OF_CLASSES = PLAIN | {FunctionType, property, staticmethod, classmethod}


class Holder(NamedTuple):
    """Something that holds values and can be changed in place.

    Attributes:
        path: for people, from the module where it was found: ``cache['means']``; empty for that module's registries.
        value: a registry, a container, an object, a class, a generator, an array.
        module: the module where it was found.
        attribute: the attribute of that module from which it was reached; empty for registries.
    """

    path: str
    value: Any
    module: nn.Module
    attribute: str = ""


def holders_of(modules: Iterable[nn.Module], *, own: bool = False) -> list[Holder]:
    """Everything that modules, and those in them, hold things in, each once, in a fixed order.

    Args:
        modules: the modules.
        own: leave out what every module has: the registries of its hooks and of its children.
    """
    found: dict[int, Holder] = {}
    seen: set[int] = set()
    for module in modules:
        for part in module.modules():
            _visit_module(part, found, seen, own)
    return list(found.values())


def _visit_module(module: nn.Module, found: dict[int, Holder], seen: set[int], own: bool) -> None:
    attributes = module.__dict__
    if id(attributes) in found:
        return
    for registry in (module._parameters, module._buffers, *(() if own else (module._modules,)), attributes):
        if type(registry) is dict or is_container(
            type(registry)
        ):  # a scripted module's are views of what it has elsewhere
            found[id(registry)] = Holder("", registry, module)
            seen.add(id(registry))
    for cls in classes_of(type(module)):
        if id(cls) not in found:
            found[id(cls)] = Holder(cls.__qualname__, cls, module, cls.__qualname__)
            for name, value in class_attributes(cls).items():
                if type(value) in _OF_CLASSES:
                    continue
                _visit(f"{cls.__qualname__}.{name}", value, Holder("", cls, module, cls.__qualname__), found, seen)
    for name, value in attributes.items():
        if type(value) in PLAIN or (own and name in OF_TORCH):
            continue
        if type(value) is OrderedDict and not value:  # hooks, of which there are none
            found[id(value)] = Holder(name, value, module, name)
        elif type(value) is not tuple or not PLAIN.issuperset(map(type, value)):
            _visit(name, value, Holder(name, None, module, name), found, seen)


def _visit(path: str, value: Any, start: Holder, found: dict[int, Holder], seen: set[int]) -> None:
    """Note what ``value`` and everything in it holds; ``start`` is the attribute from which it was reached."""
    pending = [(path, value)]
    while pending:
        path, value = pending.pop()
        kind = type(value)
        if kind in PLAIN or id(value) in seen or isinstance(value, Tensor | type):
            continue
        if isinstance(value, nn.Module):
            for part in value.modules():
                _visit_module(part, found, seen, own=False)
            continue
        seen.add(id(value))
        if isinstance(value, tuple | frozenset):
            pending.extend((f"{path}[{i}]", member) for i, member in enumerate(value))
        elif is_container(kind):
            found[id(value)] = start._replace(path=path, value=value)
            pending.extend((f"{path}[{key!r}]", member) for key, member in items(value) if type(member) not in PLAIN)
        for held in _attributes(value):
            found[id(held)] = start._replace(path=path, value=held)
            pending.extend((f"{path}.{name}", member) for name, member in items(read(held)))


def _attributes(value: Any) -> Iterator[Any]:
    """The attributes of an object of a class of the user's or of a library: its dictionary, and its slots."""
    if is_opaque(type(value)):
        return
    held = getattr(value, "__dict__", None)
    if type(held) is dict:
        yield held
    if names := slots_of(type(value)):
        yield Slots(value, names)


def iterator_in(modules: Iterable[nn.Module]) -> str | None:
    """The way to an iterator that modules hold, which can't be gone back to; None where there is none."""
    for holder in holders_of(modules, own=True):
        for key, value in items(read(holder.value)):
            if isinstance(value, Iterator):
                return ".".join(filter(None, (type(holder.module).__qualname__, holder.path, str(key))))
    return None


def may_change(module: nn.Module) -> bool:
    """Whether a call may leave the module changed: it has buffers or hooks, or is not a layer of torch's own."""
    return bool(
        module._buffers
        or module._forward_hooks
        or module._forward_pre_hooks
        or getattr(module, "max_norm", None) is not None
        or "forward" in module.__dict__
        or not type(module).__module__.startswith("torch.nn.")
    )
