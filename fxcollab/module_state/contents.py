"""Contents: what lies in a holder, read as another object, compared, and gone back to."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from fxcollab.module_state.classes import by_class


@dataclass(frozen=True)
class Slots:
    """What an object has in the slots of its class."""

    owner: Any
    names: tuple[str, ...]


def is_container(of: type) -> bool:
    """Whether objects of this type are containers, generators, arrays, slots or classes, and known here."""
    return _kind_of(of) is not None


def read(held: Any) -> Any:
    """What is held: another object, which later changes leave alone."""
    return _known(held).read(held)


def restore_contents(held: Any, before: Any) -> None:
    """Hold again contents that were read before; what is the same stays untouched."""
    if next(changed(before, read(held)), _NOTHING) is not _NOTHING:
        _known(held).write(held, before)


def items(contents: Any) -> Iterable[tuple[Any, Any]]:
    """What lies in a container, with the way to it."""
    if isinstance(contents, dict):
        return dict.items(contents)
    return enumerate(contents) if isinstance(contents, (list, set, deque)) else ()


def changed(before: Any, now: Any) -> Iterator[Any]:
    """The keys or places at which two readings differ; None for generators and arrays."""
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


def class_attributes(cls: type) -> dict[str, Any]:
    """What a class has, except what every class has."""
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def _write_attributes(held: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in now.keys() - before.keys():
        delattr(held, name)
    for name, value in before.items():
        if now.get(name, _NOTHING) is not value:
            setattr(held, name, value)


def _read_slots(held: Slots) -> dict[str, Any]:
    return {name: getattr(held.owner, name) for name in held.names if hasattr(held.owner, name)}


_STATE = _Kind(lambda held: held.get_state(), lambda held, before: held.set_state(before))
_KINDS: Mapping[type, _Kind] = {
    OrderedDict: _Kind(lambda held: dict(OrderedDict.items(held)), _write_ordered),
    dict: _Kind(dict.copy, _write_dict),
    list: _Kind(list.copy, lambda held, before: list.__setitem__(held, slice(None), before)),
    deque: _Kind(lambda held: list(deque.__iter__(held)), _write_all(deque.clear, deque.extend)),
    set: _Kind(lambda held: set(set.__iter__(held)), _write_all(set.clear, set.update)),
    type: _Kind(class_attributes, lambda held, before: _write_attributes(held, before, class_attributes(held))),
    Slots: _Kind(_read_slots, lambda held, before: _write_attributes(held.owner, before, _read_slots(held))),
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
