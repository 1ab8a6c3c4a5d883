"""Tracing runs the caller's code; whatever that code sets on the modules is put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def preserved(modules: Iterable[nn.Module]) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Restore attributes, registrations and plain containers of modules and their classes, also after a failure.

    Yields a function that names what was set since: ``step``, ``layer1.ema``.
    """
    modules = list(modules)
    saved = [(module, _snapshot(module)) for module in modules]
    classes = [(cls, dict(vars(cls))) for cls in _own_classes(modules)]
    try:
        yield lambda: tuple(_changed(saved, modules))
    finally:
        for module, (attributes, containers) in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        for cls, attributes in classes:
            _restore_class(cls, attributes)


def set_mode(modules: Iterable[nn.Module], training: bool) -> None:
    """Set the flag alone: neither the children's nor through an overridden ``train()``."""
    for module in modules:
        module.__dict__["training"] = training


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The attributes, and what is in those that a forward may fill: registries, lists, caches."""
    attributes = dict(module.__dict__)
    containers = [value for value in attributes.values() if type(value) in _CONTAINERS]
    return attributes, [(container, container.copy()) for container in containers]


def _changed(saved: list[tuple[nn.Module, Any]], modules: list[nn.Module]) -> Iterator[str]:
    names = {module: f"{path}." if path else "" for path, module in modules[0].named_modules()} if modules else {}
    for module, (attributes, containers) in saved:
        prefix = names.get(module, "")
        present = module.__dict__
        set_since = [k for k, v in present.items() if k != "training" and attributes.get(k, present) is not v]
        for container, content in containers:
            if isinstance(container, dict):
                inside = [k for k, v in container.items() if content.get(k, container) is not v]
                name = next(k for k, v in attributes.items() if v is container)
                set_since += inside if name in _REGISTRIES else [name] * bool(inside)
            elif len(container) != len(content):
                set_since.append(next(k for k, v in attributes.items() if v is container))
        yield from (f"{prefix}{name}" for name in dict.fromkeys(map(str, set_since)))


_REGISTRIES = ("_parameters", "_buffers", "_modules")


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


_CONTAINERS = (dict, OrderedDict, list, set)
