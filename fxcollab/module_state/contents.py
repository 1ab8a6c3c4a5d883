"""Contents of containers, objects and generators: read into a copy, compared, restored."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Slots:
    """The values in an object's ``__slots__``, as a container."""

    owner: Any
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """How containers of one type are read and written: by methods of the type itself, not of subclasses."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]


_MISSING = object()


def cached_by_class(function: Callable[[type], T]) -> Callable[[type], T]:
    """Cache the result for each class, without keeping the class alive."""
    known: WeakKeyDictionary[type, T] = WeakKeyDictionary()

    def cached(cls: type) -> T:
        if cls not in known:
            known[cls] = function(cls)
        return known[cls]

    return cached


def is_container(cls: type) -> bool:
    """Whether `read` knows objects of this type: containers, generators, arrays, slots and classes."""
    return _kind_of(cls) is not None


def read(container: Any) -> Any:
    """The contents as a new object, which later changes of the container don't reach."""
    return _known_kind(container).read(container)


def restore_contents(container: Any, before: Any) -> None:
    """Write contents that were read before back; values that haven't changed aren't touched."""
    if next(changed(before, read(container)), _MISSING) is not _MISSING:
        _known_kind(container).write(container, before)


def items(contents: Any) -> Iterable[tuple[Any, Any]]:
    """The members of a container with their keys or indices."""
    if isinstance(contents, dict):
        return dict.items(contents)
    return enumerate(contents) if isinstance(contents, (list, set, deque)) else ()


def changed(before: Any, now: Any) -> Iterator[Any]:
    """The keys or indices at which two results of `read` differ; None for generators and arrays."""
    if isinstance(now, dict):
        yield from (key for key in {**before, **now} if before.get(key, _MISSING) is not now.get(key, _MISSING))
    elif isinstance(now, list):
        pairs = enumerate(zip_longest(before, now, fillvalue=_MISSING))
        yield from (i for i, (one, other) in pairs if one is not other)
    elif isinstance(now, set):
        yield from before ^ now
    elif not _equal(before, now):
        yield None


def _equal(one: Any, other: Any) -> bool:
    """Whether plain values, arrays, or states of generators are equal; NaN equals NaN."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if getattr(one, "shape", ()) != getattr(other, "shape", ()):
        return False
    equal = (one == other) | ((one != one) & (other != other))
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def class_attributes(cls: type) -> dict[str, Any]:
    """The attributes of a class, without those that every class has."""
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def _write_dict(container: Any, before: dict[Any, Any]) -> None:
    for key in [key for key in dict.keys(container) if key not in before]:
        dict.__delitem__(container, key)
    for key, value in before.items():
        if dict.get(container, key, _MISSING) is not value:
            dict.__setitem__(container, key, value)
    if list(dict.keys(container)) != list(before):
        dict.clear(container)
        dict.update(container, before)


def _write_ordered(container: Any, before: dict[Any, Any]) -> None:
    OrderedDict.clear(container)
    for key, value in before.items():
        OrderedDict.__setitem__(container, key, value)


def _write_deque(container: Any, before: list[Any]) -> None:
    deque.clear(container)
    deque.extend(container, before)


def _write_set(container: Any, before: set[Any]) -> None:
    set.clear(container)
    set.update(container, before)


def _write_attributes(owner: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in now.keys() - before.keys():
        delattr(owner, name)
    for name, value in before.items():
        if now.get(name, _MISSING) is not value:
            setattr(owner, name, value)


def _read_slots(slots: Slots) -> dict[str, Any]:
    return {name: getattr(slots.owner, name) for name in slots.names if hasattr(slots.owner, name)}


_STATE = _Kind(lambda generator: generator.get_state(), lambda generator, before: generator.set_state(before))
_KINDS: Mapping[type, _Kind] = {
    OrderedDict: _Kind(lambda container: dict(OrderedDict.items(container)), _write_ordered),
    dict: _Kind(dict.copy, _write_dict),
    list: _Kind(list.copy, lambda container, before: list.__setitem__(container, slice(None), before)),
    deque: _Kind(lambda container: list(deque.__iter__(container)), _write_deque),
    set: _Kind(lambda container: set(set.__iter__(container)), _write_set),
    type: _Kind(class_attributes, lambda cls, before: _write_attributes(cls, before, class_attributes(cls))),
    Slots: _Kind(_read_slots, lambda slots, before: _write_attributes(slots.owner, before, _read_slots(slots))),
    torch.Generator: _STATE,
    random.Random: _Kind(lambda generator: generator.getstate(), lambda generator, state: generator.setstate(state)),
}
# By name, since numpy may not be installed.
_NUMPY_KINDS: Mapping[str, _Kind] = {
    "ndarray": _Kind(lambda array: array.copy(), lambda array, before: array.__setitem__(..., before)),
    "RandomState": _STATE,
    "Generator": _Kind(
        lambda generator: (generator.bit_generator.state,),
        lambda generator, before: setattr(generator.bit_generator, "state", *before),
    ),
}


@cached_by_class
def _kind_of(cls: type) -> _Kind | None:
    kind = next((_KINDS[base] for base in cls.__mro__ if base in _KINDS), None)
    return _NUMPY_KINDS.get(cls.__name__) if kind is None and cls.__module__.startswith("numpy") else kind


def _known_kind(value: Any) -> _Kind:
    kind = _kind_of(type(value))
    assert kind is not None
    return kind
