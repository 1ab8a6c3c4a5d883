"""Snapshot: what holders hold at a moment, to be gone back to."""

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
    """The contents of holders at a moment.

    Attributes:
        holders: what is held.
        contents: of each, as `read` gives them.
    """

    holders: Sequence[Holder]
    contents: Sequence[Any]

    @classmethod
    def of(cls, holders: Iterable[Holder]) -> Snapshot:
        """What they hold now."""
        holders = tuple(holders)
        return cls(holders, [read(holder.value) for holder in holders])

    def restore(self) -> None:
        """Go back to it; tensors themselves are left alone."""
        for holder, contents in zip(self.holders, self.contents, strict=True):
            restore_contents(holder.value, contents)

    def changed(self) -> Iterator[tuple[Holder, Any]]:
        """The holders that hold something else now, with each key or place; None for generators and arrays."""
        for holder, before in zip(self.holders, self.contents, strict=True):
            yield from ((holder, key) for key in changed(before, read(holder.value)))

    def cloned(self) -> Snapshot:
        """The same with copies of tensors, except of those that have a gradient; what shared memory still does."""
        tensors = (tensor for held in self.contents for _, value in items(held) for tensor in tensors_in(value))
        copies = clones({id(tensor): tensor for tensor in tensors if not has_gradient(tensor)}.values())

        def copied(value: Any) -> Any:
            return map_tensors(value, lambda tensor: copies.get(id(tensor), tensor))

        return Snapshot(self.holders, [_mapped(held, copied) for held in self.contents])

    def with_gradients(self) -> Iterator[tuple[Holder, Any, Tensor]]:
        """The tensors that `cloned` leaves as they are, each once, with their holder and key."""
        seen: set[int] = set()
        for holder, contents in zip(self.holders, self.contents, strict=True):
            for key, value in items(contents):
                if isinstance(value, Tensor) and has_gradient(value) and id(value) not in seen:
                    seen.add(id(value))
                    yield holder, key, value


def _mapped(contents: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(contents, dict):
        return {key: function(value) for key, value in contents.items()}
    return [function(value) for value in contents] if isinstance(contents, list) else contents
