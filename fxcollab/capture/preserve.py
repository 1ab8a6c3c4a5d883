"""Tracing runs the caller's code; whatever that code sets on the modules is put back."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


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
            for _, container, content in containers:
                container.clear()
                (container.extend if isinstance(container, list | deque) else container.update)(content)
        for cls, attributes in classes:
            _restore_class(cls, attributes)


def replace_plain_tensors(module: nn.Module, replacement: Callable[[Tensor], Tensor]) -> None:
    """Put others in the place of a module's tensors that are no state; `preserved` takes that back."""
    for container in _containers([module.__dict__], set()):
        if any(container is own for own in (module._parameters, module._buffers)):
            continue
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(items) if not isinstance(container, set) else ():
            if isinstance(value, Tensor):
                container[key] = replacement(value)


def set_mode(modules: Iterable[nn.Module], training: bool) -> None:
    """Set the flag alone: neither the children's nor through an overridden ``train()``."""
    for module in modules:
        module.__dict__["training"] = training


_Saved = tuple[dict[str, Any], list[tuple[str, Any, Any]]]


def _snapshot(module: nn.Module) -> _Saved:
    """The attributes, and by their names what is in those that a forward may fill: registries, lists, caches."""
    attributes, seen = dict(module.__dict__), set[int]()
    filled = ((name, value) for name, value in attributes.items() if type(value) in _HOLDERS)
    inside = ((name, container) for name, value in filled for container in _containers([value], seen))
    return attributes, [(name, container, container.copy()) for name, container in inside]


def _containers(values: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    """Lists, dicts and the like among ``values``, and inside of one another."""
    for value in values:
        if isinstance(value, SimpleNamespace):
            value = value.__dict__
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            yield value
            yield from _containers(value.values() if isinstance(value, dict) else value, seen)


def _changed(saved: list[tuple[nn.Module, _Saved]], modules: list[nn.Module]) -> Iterator[str]:
    names = {module: f"{path}." if path else "" for path, module in modules[0].named_modules()} if modules else {}
    for module, (attributes, containers) in saved:
        prefix = names.get(module, "")
        present = module.__dict__
        set_since = [k for k, v in present.items() if k != "training" and attributes.get(k, present) is not v]
        for name, container, content in containers:
            changed = list(_changed_inside(container, content))
            set_since += changed if name in _REGISTRIES else [name] * bool(changed)
        yield from (f"{prefix}{name}" for name in dict.fromkeys(map(str, set_since)))


def _changed_inside(container: Any, content: Any) -> Iterator[Any]:
    """Keys of a dict, places of a list that hold another value now."""
    if isinstance(container, dict):
        yield from (k for k, v in container.items() if content.get(k, container) is not v)
    elif isinstance(container, set):
        yield from container - content
    else:
        yield from (k for k, (one, other) in enumerate(zip_longest(container, content)) if one is not other)


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


_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, deque, set))
_HOLDERS = _CONTAINERS | {SimpleNamespace}
