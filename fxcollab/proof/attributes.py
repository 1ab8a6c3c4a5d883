"""Which attributes of modules a call sets: first-call flags, counters, hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxcollab.contents import Contents

Attributes = set[tuple[str, str]]
"""Paths of modules with the names of attributes."""

_REGISTRIES = {"_parameters", "_buffers", "_modules", "training", "_graph"}


@contextmanager
def attributes_set(model: nn.Module) -> Iterator[Attributes]:
    """Yield a set which, on leaving, has the attributes that were set or written into meanwhile."""
    contents, found = Contents(modules=True), Attributes()
    before = dict(_held(model, contents))
    yield found
    after = dict(_held(model, contents))
    found.update(key for key in {**before, **after} if before.get(key, []) != after.get(key, []))


def _held(model: nn.Module, contents: Contents) -> Iterator[tuple[tuple[str, str], Any]]:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # which makes its attributes when they are read
            continue
        for name, value in vars(module).items():
            if name not in _REGISTRIES and not (isinstance(value, dict) and not value):
                yield (path, name), contents.of(value)
