"""Whether a model is as it was: state, flags, hooks, attributes, and those of its classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, tuple)


class Untouched:
    """Remembers all of a model that capturing must leave alone.

    The objects are kept, so that one which was replaced can't be mistaken for another at the same address.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(_facts(model))

    def differences(self) -> list[str]:
        """What is no longer as it was."""
        now = dict(_facts(self._model))
        changed = [name for name in self._before.keys() & now.keys() if not _same(self._before[name], now[name])]
        return sorted([*changed, *(self._before.keys() ^ now.keys())])


def _facts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "random state", torch.get_rng_state()
    yield "gradient mode", torch.is_grad_enabled()
    classes: dict[type, None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        yield f"{path}: class", type(module)
        classes |= dict.fromkeys(type(module).__mro__)
        for name, value in module.__dict__.items():
            yield from _value(f"{path}.{name}", value)
    for cls in classes:
        if cls is not object:
            yield from ((f"{cls.__qualname__}.{k}", v) for k, v in vars(cls).items() if not k.startswith("__"))


def _value(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The object itself, and what is in it where it is a tensor or a container."""
    yield name, value
    if isinstance(value, Tensor):
        yield f"{name} (version, gradient)", (value._version, value.requires_grad, value.grad)
    elif isinstance(value, dict):
        yield f"{name} (keys)", tuple(map(str, value))
        for key, inner in value.items():
            yield from _value(f"{name}.{key}", inner)
    elif isinstance(value, _CONTAINERS):
        yield f"{name} (length)", len(value)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == torch.uint8:  # the random state
        return torch.equal(one, other)
    return isinstance(one, tuple | int) and type(one) is type(other) and one == other
