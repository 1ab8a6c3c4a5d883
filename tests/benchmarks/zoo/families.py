"""What the tables of further libraries are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Make = Callable[[torch.Generator, int], Any]


@dataclass(frozen=True)
class Family:
    """Models that are called alike.

    Attributes:
        module: from which the names in expressions come.
        inputs: their example inputs.
        models: Python expressions, each of which makes one; ``small`` in them is that of the family.
        small: arguments that several expressions share.
        stages: where they are split; found, if there are none.
    """

    module: str
    inputs: Inputs
    models: tuple[str, ...]
    small: Mapping[str, Any]
    stages: tuple[str, ...] = ()


class Inputs:
    """Makes example inputs: a tuple is the shape of one sample of random numbers; other values are what they are."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        self.positional, self.named = positional, named

    def __call__(self, model: nn.Module, batch: int = 2) -> Any:
        """A dict for the model's forward; a tuple where its parameters have no names."""
        generator = torch.Generator().manual_seed(0)
        parameters = inspect.signature(model.forward).parameters
        positional = [_value(spec, generator, batch) for spec in self.positional]
        named = {name: _value(spec, generator, batch) for name, spec in self.named.items()}
        if positional and next(iter(parameters.values())).kind is inspect.Parameter.VAR_POSITIONAL:
            return tuple(positional)
        return {**dict(zip(parameters, positional, strict=False)), **named}


def _value(spec: Any, generator: torch.Generator, batch: int) -> Any:
    if isinstance(spec, tuple):
        return torch.randn(batch, *spec, generator=generator)
    return spec(generator, batch) if callable(spec) else spec


def ids(limit: int, *shape: int) -> Make:
    """Whole numbers below a limit."""
    return lambda generator, batch: torch.randint(0, limit, (batch, *shape), generator=generator)


def table(module: str, inputs: Inputs, models: str, stages: tuple[str, ...] = (), **small: Any) -> Family:
    """A family, with one model a line."""
    return Family(module, inputs, tuple(line.strip() for line in models.strip().splitlines()), small, stages)
