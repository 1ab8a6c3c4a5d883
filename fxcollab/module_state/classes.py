"""Classes: whose they are, and what is found out once for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


def by_class(function: Callable[[type], T]) -> Callable[[type], T]:
    """Found out once a class; classes made on the way aren't kept alive."""
    known: WeakKeyDictionary[type, T] = WeakKeyDictionary()

    def found(of: type) -> T:
        if of not in known:
            known[of] = function(of)
        return known[of]

    return found


@by_class
def classes_of(of: type) -> tuple[type, ...]:
    """The classes of an object that its author wrote."""
    return tuple(
        cls for cls in of.__mro__ if cls.__module__.partition(".")[0] not in ("torch", "builtins", "fxcollab")
    )


@by_class
def slots_of(of: type) -> tuple[str, ...]:
    """The names of the slots that objects of a class have."""
    declared = (cls.__dict__.get("__slots__", ()) for cls in of.__mro__)
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


_OPAQUE = frozenset((*sys.stdlib_module_names, "torch")) - {"collections", "types"}


def is_opaque(of: type) -> bool:
    """Whether it is of Python's own library or of torch, and no container."""
    return of.__module__.partition(".")[0] in _OPAQUE
