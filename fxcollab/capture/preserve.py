"""Tracing runs the caller's code; whatever that code sets on the modules is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fxcollab.holders import Holder, Snapshot, holders_of, items


@contextmanager
def preserved(modules: Iterable[nn.Module]) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Restore everything that modules hold, and the attributes of their classes, also after a failure.

    Yields a function that names what was set since: ``step``, ``layer1.ema``.
    """
    modules = list(modules)
    before = Snapshot(holders_of(modules))
    classes = [(cls, dict(vars(cls))) for cls in _own_classes(modules)]
    try:
        yield lambda: tuple(_names(before.changed(), modules))
    finally:
        before.restore()
        for cls, attributes in classes:
            _restore_class(cls, attributes)


def replace_plain_tensors(modules: Iterable[nn.Module], replacement: Callable[[Tensor], Tensor]) -> None:
    """Put others in the place of modules' tensors that are no state; `preserved` takes that back."""
    for holder in holders_of(modules):
        module = holder.module
        if module is None or holder.value is module._parameters or holder.value is module._buffers:
            continue
        for key, value in list(items(holder.value)) if not isinstance(holder.value, set) else ():
            if isinstance(value, Tensor):
                holder.value[key] = replacement(value)


def set_mode(modules: Iterable[nn.Module], training: bool) -> None:
    """Set the flag alone: neither the children's nor through an overridden ``train()``."""
    for module in modules:
        module.__dict__["training"] = training


def _names(changed: Iterable[tuple[Holder, Any]], modules: list[nn.Module]) -> Iterator[str]:
    """The attributes that hold something else, each once."""
    paths = {module: f"{path}." if path else "" for path, module in modules[0].named_modules()} if modules else {}
    found: dict[str, None] = {}
    for holder, key in changed:
        if holder.path or key != "training":
            assert holder.module is not None
            found[paths.get(holder.module, "") + (holder.attribute or str(key))] = None
    return iter(found)


def _own_classes(modules: Iterable[nn.Module]) -> list[type]:
    """The classes that the modules' authors wrote."""
    classes = {cls: None for module in modules for cls in type(module).__mro__}
    return [cls for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins")]


def _restore_class(cls: type, attributes: dict[str, Any]) -> None:
    for name, value in dict(vars(cls)).items():
        if name not in attributes:
            delattr(cls, name)
        elif attributes[name] is not value and not name.startswith("__"):
            setattr(cls, name, attributes[name])
