"""Snapshots of what modules hold, to be compared and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxcollab.module_state.contents import changed, items, read, restore_contents
from fxcollab.module_state.holders import Holder
from fxcollab.module_state.tensors import clones, has_gradient, map_tensors, tensors_in


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Holders, and a copy of the contents of each."""

    holders: Sequence[Holder]
    contents: Sequence[Any]

    @classmethod
    def of(cls, holders: Iterable[Holder]) -> Snapshot:
        """The contents as they are now."""
        holders = tuple(holders)
        return cls(holders, [read(holder.value) for holder in holders])

    def restore(self) -> None:
        """Put the contents back; the values of tensors stay as they are."""
        for holder, contents in zip(self.holders, self.contents, strict=True):
            restore_contents(holder.value, contents)

    def changed(self) -> Iterator[tuple[Holder, Any]]:
        """The holders that have changed since, with each key or index; None for generators and arrays."""
        for holder, before in zip(self.holders, self.contents, strict=True):
            yield from ((holder, key) for key in changed(before, read(holder.value)))

    def cloned(self) -> Snapshot:
        """The same with tensors cloned, except those with gradients; clones share memory as the originals do."""
        tensors = (
            tensor for contents in self.contents for _, value in items(contents) for tensor in tensors_in(value)
        )
        copies = clones({id(tensor): tensor for tensor in tensors if not has_gradient(tensor)}.values())

        def clone(value: Any) -> Any:
            return map_tensors(value, lambda tensor: copies.get(id(tensor), tensor))

        return Snapshot(self.holders, [_map_members(contents, clone) for contents in self.contents])

    def with_gradients(self) -> Iterator[tuple[Holder, Any, Tensor]]:
        """The tensors that `cloned` doesn't clone, each once, with their holder and key."""
        seen: set[int] = set()
        for holder, contents in zip(self.holders, self.contents, strict=True):
            for key, value in items(contents):
                if isinstance(value, Tensor) and has_gradient(value) and id(value) not in seen:
                    seen.add(id(value))
                    yield holder, key, value


def _map_members(contents: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(contents, dict):
        return {key: function(value) for key, value in contents.items()}
    return [function(value) for value in contents] if isinstance(contents, list) else contents
