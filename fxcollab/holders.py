"""Holders: what modules keep things in from call to call, to be compared and to be gone back to.

These are their registries, attributes and classes, and what is reached from them and can be changed in place: lists
and dictionaries, objects, generators of random numbers, arrays. Left out are other objects of Python's own library
(files, locks, iterators) and of torch (scripted modules), globals, and what functions close over.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")


def by_class(function: Callable[[type], T]) -> Callable[[type], T]:
    """Found out once a class; classes made on the way aren't kept alive."""
    known: WeakKeyDictionary[type, T] = WeakKeyDictionary()

    def found(of: type) -> T:
        if of not in known:
            known[of] = function(of)
        return known[of]

    return found


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

    def read(self) -> Any:
        """Its contents: another object, which later changes leave alone."""
        return _known(self.value).read(self.value)

    def write(self, before: Any) -> None:
        """Go back to contents that were read before; what is the same stays untouched."""
        now = self.read()
        if next(_changed(before, now), _NOTHING) is not _NOTHING:
            _known(self.value).write(self.value, before)


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
        """The same with copies of tensors, except of those that have a gradient; what shared memory still does."""
        tensors = {id(t): t for held in self.contents for _, value in items(held) for t in _plain_tensors(value)}
        clones = _clones(list(tensors.values()))
        new = object.__new__(Snapshot)
        new.holders = self.holders
        new.contents = [
            _mapped(held, lambda value: map_tensors(value, lambda t: clones.get(id(t), t))) for held in self.contents
        ]
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
        if _kind_of(type(registry)):  # a scripted module's are views of what it has elsewhere
            found[id(registry)] = Holder("", registry, module)
            seen.add(id(registry))
    for cls in classes_of(type(module)):
        if id(cls) not in found:
            found[id(cls)] = Holder(cls.__qualname__, cls, module, cls.__qualname__)
            for name, value in _class_attributes(cls).items():
                _visit(f"{cls.__qualname__}.{name}", value, Holder("", cls, module, cls.__qualname__), found, seen)
    for name, value in attributes.items():
        if not _is_plain(value) and not (own and name in OF_TORCH):
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
        elif _kind_of(kind):
            found[id(value)] = start._replace(path=path, value=value)
            pending.extend((f"{path}[{key!r}]", member) for key, member in items(value) if type(member) not in PLAIN)
        for held in _attributes(value):
            found[id(held)] = start._replace(path=path, value=held)
            pending.extend((f"{path}.{name}", member) for name, member in items(_known(held).read(held)))


OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: registries, hooks and its mode."""
PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
"""Types of what can't be changed and holds nothing."""


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and PLAIN.issuperset(map(type, value)))


_OPAQUE = frozenset((*sys.stdlib_module_names, "torch")) - {"collections", "types"}


@dataclass(frozen=True)
class _Slots:
    """What an object has in the slots of its class."""

    owner: Any
    names: tuple[str, ...]


def _attributes(value: Any) -> Iterator[Any]:
    """The attributes of an object of a class of the user's or of a library: its dictionary, and its slots."""
    if type(value).__module__.partition(".")[0] in _OPAQUE:
        return
    held = getattr(value, "__dict__", None)
    if type(held) is dict:
        yield held
    if names := _slots_of(type(value)):
        yield _Slots(value, names)


@by_class
def _slots_of(of: type) -> tuple[str, ...]:
    declared = (cls.__dict__.get("__slots__", ()) for cls in of.__mro__)
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


@by_class
def classes_of(of: type) -> tuple[type, ...]:
    """The classes of an object that its author wrote."""
    return tuple(
        cls for cls in of.__mro__ if cls.__module__.partition(".")[0] not in ("torch", "builtins", "fxcollab")
    )


def iterator_in(modules: Iterable[nn.Module]) -> str | None:
    """The way to an iterator that modules hold, which can't be gone back to; None where there is none."""
    for holder in holders_of(modules, own=True):
        for key, value in items(holder.read()):
            if isinstance(value, Iterator):
                return ".".join(filter(None, (type(holder.module).__qualname__, holder.path, str(key))))
    return None


def is_held(value: Any) -> bool:
    """Whether it is, or has, a holder of its own."""
    return _kind_of(type(value)) is not None or next(_attributes(value), None) is not None


def items(contents: Any) -> Iterable[tuple[Any, Any]]:
    """What lies in a container, with the way to it."""
    if isinstance(contents, dict):
        return dict.items(contents)
    return enumerate(contents) if isinstance(contents, (list, set, deque)) else ()


# ----------------------------------------------------------------------------- how they are read and gone back to


@dataclass(frozen=True)
class _Kind:
    """How contents of holders of one type are read and replaced: by methods of the type itself, not of subclasses."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]


_NOTHING = object()


def _write_dict(held: Any, before: dict[Any, Any]) -> None:
    for key in [key for key in dict.keys(held) if key not in before]:
        dict.__delitem__(held, key)
    for key, value in before.items():
        if dict.get(held, key, _NOTHING) is not value:
            dict.__setitem__(held, key, value)
    if list(dict.keys(held)) != list(before):
        dict.clear(held)
        dict.update(held, before)


def _write_ordered(held: Any, before: dict[Any, Any]) -> None:
    OrderedDict.clear(held)
    for key, value in before.items():
        OrderedDict.__setitem__(held, key, value)


def _write_all(clear: Callable[[Any], None], add: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def write(held: Any, before: Any) -> None:
        clear(held)
        add(held, before)

    return write


def _class_attributes(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def _write_attributes(held: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in now.keys() - before.keys():
        delattr(held, name)
    for name, value in before.items():
        if now.get(name, _NOTHING) is not value:
            setattr(held, name, value)


def _read_slots(held: _Slots) -> dict[str, Any]:
    return {name: getattr(held.owner, name) for name in held.names if hasattr(held.owner, name)}


_STATE = _Kind(lambda held: held.get_state(), lambda held, before: held.set_state(before))
_KINDS: Mapping[type, _Kind] = {
    OrderedDict: _Kind(lambda held: dict(OrderedDict.items(held)), _write_ordered),
    dict: _Kind(dict.copy, _write_dict),
    list: _Kind(list.copy, lambda held, before: list.__setitem__(held, slice(None), before)),
    deque: _Kind(lambda held: list(deque.__iter__(held)), _write_all(deque.clear, deque.extend)),
    set: _Kind(lambda held: set(set.__iter__(held)), _write_all(set.clear, set.update)),
    type: _Kind(_class_attributes, lambda held, before: _write_attributes(held, before, _class_attributes(held))),
    _Slots: _Kind(_read_slots, lambda held, before: _write_attributes(held.owner, before, _read_slots(held))),
    torch.Generator: _STATE,
    random.Random: _Kind(lambda held: held.getstate(), lambda held, before: held.setstate(before)),
}
# By name, since numpy may be missing.
_OF_NUMPY: Mapping[str, _Kind] = {
    "ndarray": _Kind(lambda held: held.copy(), lambda held, before: held.__setitem__(..., before)),
    "RandomState": _STATE,
    "Generator": _Kind(
        lambda held: (held.bit_generator.state,), lambda held, before: setattr(held.bit_generator, "state", *before)
    ),
}


@by_class
def _kind_of(of: type) -> _Kind | None:
    found = next((_KINDS[cls] for cls in of.__mro__ if cls in _KINDS), None)
    return _OF_NUMPY.get(of.__name__) if found is None and of.__module__.startswith("numpy") else found


def _known(value: Any) -> _Kind:
    found = _kind_of(type(value))
    assert found is not None
    return found


def _changed(before: Any, now: Any) -> Iterator[Any]:
    if isinstance(now, dict):
        yield from (key for key in {**before, **now} if before.get(key, _NOTHING) is not now.get(key, _NOTHING))
    elif isinstance(now, list):
        pairs = enumerate(zip_longest(before, now, fillvalue=_NOTHING))
        yield from (i for i, (one, other) in pairs if one is not other)
    elif isinstance(now, set):
        yield from before ^ now
    elif not same(before, now):
        yield None


def same(one: Any, other: Any) -> bool:
    """Whether plain values, arrays, or states of generators are equal; what is no number equals itself."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if getattr(one, "shape", ()) != getattr(other, "shape", ()):
        return False
    equal = (one == other) | ((one != one) & (other != other))
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


# ----------------------------------------------------------------------------------------------------- tensors


def version(tensor: Tensor) -> int:
    """How often it was written into, as far as that leaves a trace."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


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


def _has_gradient(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _plain_tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if not _has_gradient(tensor):
            found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def _clones(tensors: list[Tensor]) -> dict[int, Tensor]:
    """A copy of each by its id; views of one storage are views of one again."""
    sharing: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        strided = tensor.layout is torch.strided and type(tensor) is Tensor
        sharing.setdefault(tensor.untyped_storage()._cdata if strided else id(tensor), []).append(tensor)
    clones: dict[int, Tensor] = {}
    with torch.no_grad():
        for views in sharing.values():
            if len(views) == 1:
                clones[id(views[0])] = views[0].clone()
                continue
            storage = views[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
            for view in views:
                place = storage, view.storage_offset(), view.size(), view.stride()
                clones[id(view)] = torch.empty(0, dtype=view.dtype, device=view.device).set_(*place)
    return clones


def _mapped(contents: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(contents, dict):
        return {key: function(value) for key, value in contents.items()}
    return [function(value) for value in contents] if isinstance(contents, list) else contents
