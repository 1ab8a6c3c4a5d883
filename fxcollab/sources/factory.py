"""Functions that make models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxcollab.errors import CaptureError


def model_of(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The model itself, or what a zero-argument factory makes.

    Raises:
        CaptureError: it is neither.
    """
    return model if isinstance(model, nn.Module) else _made_by(model)


def _made_by(factory: Any) -> nn.Module:
    if not callable(factory):
        raise CaptureError(
            f"A {type(factory).__qualname__} is no model.", hint="give a module, or a function that makes one"
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"The factory returned a {type(model).__qualname__}, not a module.",
            where=getattr(factory, "__qualname__", repr(factory)),
            hint="let it return the nn.Module",
        )
    return model
