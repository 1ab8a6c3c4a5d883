"""What objects hold: as a list that can be compared with a later one, and the tensors among it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Set
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import pytree, version_of
from fxcollab.deep_copy import attributes_of

_VALUES = (type(None), bool, int, float, complex, str, bytes)
_IDENTITIES = (type, FunctionType, BuiltinFunctionType, ModuleType)


class Contents:
    """Lists what objects hold; what it has met is kept alive, so that no other object gets the id of one.

    Tensors are listed by identity and version; functions, classes and what nothing is known of by identity; any other
    object by the state that it would be copied with.

    Args:
        known: ids of objects that are listed by identity alone.
        modules: whether modules are, too.
    """

    def __init__(self, known: Collection[int] = (), *, modules: bool = False) -> None:
        self._known, self._modules = known, modules
        self._met: list[Any] = []

    def of(self, value: Any) -> list[Any] | None:
        """What ``value`` holds; None where an iterator is in it that can't be read."""
        found: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some iterators will be copied no longer
            return found if self._add(value, found, {}) else None

    def _add(self, value: Any, found: list[Any], seen: dict[int, int]) -> bool:
        self._met.append(value)
        if isinstance(value, _VALUES):
            found.append((type(value), repr(value)))
            return True
        if id(value) in seen:
            found.append(seen[id(value)])
            return True
        seen[id(value)] = len(seen)
        if isinstance(value, Tensor):
            found.append((id(value), version_of(value)))
            return True
        if isinstance(value, torch.Generator):
            found.append(bytes(value.get_state().tolist()))
            return True
        if self._is_identity(value):
            found.append(id(value))
            return True
        if isinstance(value, dict | list | tuple | set | frozenset) and type(value).__module__ == "builtins":
            found.append((type(value), len(value)))
            members = [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)
            return all(self._add(part, found, seen) for part in members)
        return self._add_state(value, found, seen)

    def _is_identity(self, value: Any) -> bool:
        if id(value) in self._known or isinstance(value, _IDENTITIES):
            return True
        if isinstance(value, nn.Module):
            return self._modules
        # Objects with which torch does its own work: of FSDP, of a compiler.
        inside = type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "__dict__")
        return inside and not isinstance(value, Iterator)

    def _add_state(self, value: Any, found: list[Any], seen: dict[int, int]) -> bool:
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # whatever says that it can't be copied
            found.append(id(value))
            return not isinstance(value, Iterator)
        if not isinstance(reduced, tuple):  # the name of a constant
            found.append(id(value))
            return True
        parts = [list(part) if isinstance(part, Iterator) else part for part in reduced[1:]]
        return all(self._add(part, found, seen) for part in parts)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of an output structure."""
    return (leaf for leaf in pytree.tree_leaves(without_objects(output)) if isinstance(leaf, Tensor))


def without_objects(output: Any, seen: Set[int] = frozenset()) -> Any:
    """The output with objects, which are leaves to pytree, as dicts of their members and attributes."""

    def held(value: Any) -> Any:
        if isinstance(value, Tensor | type | FunctionType | nn.Module):
            return value
        attributes = attributes_of(value)
        members = dict(value) if isinstance(value, dict) else {}
        if id(value) in seen or not (attributes or members):
            return type(value).__qualname__ if id(value) in seen else value
        return {type(value).__qualname__: without_objects([attributes, members], {id(value), *seen})}

    return pytree.tree_map(held, output)
