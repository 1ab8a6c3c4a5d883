"""Which attributes of modules a call sets: first-call flags, counters, hidden states."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from fxcollab._torch import version_of

Attributes = set[tuple[str, str]]
"""Paths of modules with the names of attributes."""

_REGISTRIES = {"_parameters", "_buffers", "_modules", "training", "_graph"}


@contextmanager
def attributes_set(model: nn.Module) -> Iterator[Attributes]:
    """Yield a set which, on leaving, has the attributes that were set or written into meanwhile."""
    before, found = dict(_contents(model)), Attributes()
    yield found
    after = dict(_contents(model))
    found.update(key for key in {**before, **after} if not _same(before.get(key, []), after.get(key, [])))


def _contents(model: nn.Module) -> Iterator[tuple[tuple[str, str], list[Any]]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _REGISTRIES and not (isinstance(value, dict) and not value):
                yield (path, name), list(_parts(value, set()))


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """What is in ``value``: as long as each is the same object, and of the same version, nothing was written."""
    yield value
    if isinstance(value, Tensor):
        yield None if value.is_inference() else version_of(value)
    elif id(value) in seen or isinstance(value, nn.Module | type | FunctionType | MethodType | ModuleType):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _parts(item, seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            yield from _parts(item, seen)
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value), seen)


def _same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        one is other or (type(one) is int and one == other) for one, other in zip(before, after, strict=True)
    )
