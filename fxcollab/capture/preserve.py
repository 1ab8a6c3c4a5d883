"""Tracing runs the caller's code; whatever that code sets on the modules is put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def preserved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore every module's attributes and registrations on leaving, also after a failure."""
    saved = [(module, _snapshot(module)) for module in modules]
    try:
        yield
    finally:
        for module, (attributes, registries) in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in registries.items():
                registry = module.__dict__[name]
                registry.clear()
                registry.update(entries)


def set_mode(modules: Iterable[nn.Module], training: bool) -> None:
    """Set the flag alone: neither the children's nor through an overridden ``train()``."""
    for module in modules:
        module.__dict__["training"] = training


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    attributes = dict(module.__dict__)
    return attributes, {name: dict(attributes[name]) for name in ("_parameters", "_buffers", "_modules")}
