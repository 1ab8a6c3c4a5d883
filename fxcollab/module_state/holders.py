"""Holders: the objects in which modules keep values from call to call.

These are their registries, attributes and classes, and what can be reached from them and be changed in place: lists
and dictionaries, objects, random number generators, arrays. Other objects of the standard library (files, locks,
iterators) and of torch (scripted modules), globals and variables of closures are left out.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxcollab.module_state.contents import Slots, cached_by_class, class_attributes, is_container, items, read

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
_OF_CLASSES = _PLAIN | {FunctionType, property, staticmethod, classmethod}
_OPAQUE = frozenset((*sys.stdlib_module_names, "torch")) - {"collections", "types"}


class Holder(NamedTuple):
    """An object that has values in it and can be changed in place.

    ``path`` leads there from the module where it was found, for messages: ``cache['means']``; it is empty for that
    module's registries, and so is ``attribute``, the module's attribute with which the path begins.
    """

    path: str
    value: Any
    module: nn.Module
    attribute: str = ""


def holders_of(modules: Iterable[nn.Module], *, own: bool = False) -> list[Holder]:
    """All holders of the modules and their submodules, each once, in a fixed order.

    ``own`` leaves out what every module has: the registries of its hooks and of its children.
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
        if type(registry) is dict or is_container(type(registry)):  # those of a scripted module are views
            found[id(registry)] = Holder("", registry, module)
            seen.add(id(registry))
    for cls in _user_classes(type(module)):
        if id(cls) not in found:
            found[id(cls)] = holder = Holder(cls.__qualname__, cls, module, cls.__qualname__)
            for name, value in class_attributes(cls).items():
                if type(value) not in _OF_CLASSES:
                    _visit(f"{cls.__qualname__}.{name}", value, holder, found, seen)
    for name, value in attributes.items():
        if type(value) in _PLAIN or (own and name in _OF_EVERY_MODULE):
            continue
        if type(value) is OrderedDict and not value:  # a registry without hooks
            found[id(value)] = Holder(name, value, module, name)
        elif type(value) is not tuple or not _PLAIN.issuperset(map(type, value)):
            _visit(name, value, Holder(name, None, module, name), found, seen)


def _visit(path: str, value: Any, start: Holder, found: dict[int, Holder], seen: set[int]) -> None:
    """Add the holders in ``value``, which was reached from the attribute ``start``."""
    pending = [(path, value)]
    while pending:
        path, value = pending.pop()
        kind = type(value)
        if kind in _PLAIN or id(value) in seen or isinstance(value, Tensor | type):
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
            pending.extend((f"{path}[{key!r}]", member) for key, member in items(value) if type(member) not in _PLAIN)
        for container in _attributes(value):
            found[id(container)] = start._replace(path=path, value=container)
            pending.extend((f"{path}.{name}", member) for name, member in items(read(container)))


def _attributes(value: Any) -> Iterator[Any]:
    """The ``__dict__`` and the slots of an object whose class is neither torch's nor the standard library's."""
    if type(value).__module__.partition(".")[0] in _OPAQUE:
        return
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        yield attributes
    if names := _slots_of(type(value)):
        yield Slots(value, names)


@cached_by_class
def _user_classes(cls: type) -> tuple[type, ...]:
    """The class and its bases, without those of Python, torch and this library."""
    return tuple(
        base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins", "fxcollab")
    )


@cached_by_class
def _slots_of(cls: type) -> tuple[str, ...]:
    declared = (base.__dict__.get("__slots__", ()) for base in cls.__mro__)
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))
