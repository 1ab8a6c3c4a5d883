"""Attributes of modules whose values a graph has: a forward that would read others now is noticed at the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxcollab.errors import GuardError

Fixed = Mapping[tuple[str, str], Any]
"""Values by the path of a module and the name of its attribute."""


def with_check(call: Callable[..., Any], root: nn.Module, fixed: Fixed) -> Callable[..., Any]:
    """``call``, which raises a `GuardError` where an attribute has another value than the graph.

    Also where one of the root is set on the graph module itself, which no forward reads.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    values = [(modules[path], path, name, value) for (path, name), value in fixed.items() if path in modules]

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module, path, name, value in values:
            now = module.__dict__.get(name, module)
            if not path and now is value and name in self.__dict__:
                now = self.__dict__[name]
            if now is not value and (type(now) is not type(value) or (now != value and value == value)):
                raise GuardError(
                    f"The graph was captured where {f'{path}.{name}'.lstrip('.')} is {value!r}; here it is {now!r}.",
                    where=f"{type(module).__qualname__}.{name}",
                    why="the graph has the values that attributes had when the model was transformed",
                    hint="transform again after setting it; what changes during training may be a buffer, or be read "
                    "in a module of its own, which becomes one node",
                )
        if torch.compiler.is_compiling():  # which doesn't trace what fx calls
            return nn.Module.__call__(self, *args, **kwargs)
        return call(self, *args, **kwargs)

    return checked
