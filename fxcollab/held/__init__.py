"""Held: what modules keep from call to call beside parameters, to be compared and to be gone back to."""

from fxcollab.held.classes import by_class, classes_of
from fxcollab.held.contents import go_back, items, read, same
from fxcollab.held.holders import OF_TORCH, PLAIN, Holder, holders_of, is_held, iterator_in
from fxcollab.held.snapshot import Snapshot
from fxcollab.held.tensors import map_tensors, version

__all__ = [
    "OF_TORCH",
    "PLAIN",
    "Holder",
    "Snapshot",
    "by_class",
    "classes_of",
    "go_back",
    "holders_of",
    "is_held",
    "items",
    "iterator_in",
    "map_tensors",
    "read",
    "same",
    "version",
]
