"""Tracing runs the user's code, which may change the modules; here they are restored."""

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
    """On leaving, also by an error, restore everything that modules and their classes hold.

    Yields a function that names the attributes that have changed since: ``step``, ``layer1.ema``.
    """
    modules = list(modules)
    before = Snapshot.of(holders_of(modules))
    try:
        yield lambda: _names(before.changed(), modules)
    finally:
        before.restore()


def replace_plain_tensors(modules: Iterable[nn.Module], replacement: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors that modules hold outside their state dicts; `preserved` restores them."""
    for holder in holders_of(modules):
        if holder.value is holder.module._parameters or holder.value is holder.module._buffers:
            continue
        contents = read(holder.value)
        for key, value in list(items(contents)):
            replaced = map_tensors(value, replacement)
            if replaced is not value and not isinstance(contents, set):
                contents[key] = replaced
        restore_contents(holder.value, contents)


def _names(changed: Iterable[tuple[Holder, Any]], modules: list[nn.Module]) -> tuple[str, ...]:
    prefixes = {module: f"{path}." if path else "" for path, module in modules[0].named_modules()} if modules else {}
    names: dict[str, None] = {}
    for holder, key in changed:
        if isinstance(holder.value, type):
            names[f"{holder.path}.{key}"] = None
        elif holder.path or key != "training":
            names[prefixes.get(holder.module, "") + (holder.attribute or str(key))] = None
    return tuple(names)
