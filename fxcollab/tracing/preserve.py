"""Tracing runs the caller's code; whatever that code sets on the modules is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fxcollab.module_state.contents import items, read, restore_contents
from fxcollab.module_state.holders import Holder, holders_of
from fxcollab.module_state.snapshot import Snapshot
from fxcollab.module_state.tensors import map_tensors


@contextmanager
def preserved(modules: Iterable[nn.Module]) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Restore everything that modules and their classes hold, also after a failure.

    Yields a function that names what was set since: ``step``, ``layer1.ema``.
    """
    modules = list(modules)
    before = Snapshot.of(holders_of(modules))
    try:
        yield lambda: tuple(_names(before.changed(), modules))
    finally:
        before.restore()


def replace_plain_tensors(modules: Iterable[nn.Module], replacement: Callable[[Tensor], Tensor]) -> None:
    """Put others in the place of modules' tensors that are no state; `preserved` takes that back."""
    for holder in holders_of(modules):
        if holder.value is holder.module._parameters or holder.value is holder.module._buffers:
            continue
        contents = read(holder.value)
        for key, value in list(items(contents)):
            replaced = map_tensors(value, replacement)
            if replaced is not value and not isinstance(contents, set):
                contents[key] = replaced
        restore_contents(holder.value, contents)


def _names(changed: Iterable[tuple[Holder, Any]], modules: list[nn.Module]) -> Iterator[str]:
    """The attributes that hold something else, each once."""
    paths = {module: f"{path}." if path else "" for path, module in modules[0].named_modules()} if modules else {}
    found: dict[str, None] = {}
    for holder, key in changed:
        if isinstance(holder.value, type):
            found[f"{holder.path}.{key}"] = None
        elif holder.path or key != "training":
            found[paths.get(holder.module, "") + (holder.attribute or str(key))] = None
    return iter(found)
