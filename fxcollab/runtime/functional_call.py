"""Calls of modules with the parameters that they share with a shallower level as arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fxcollab.functional import call_with


class FunctionalCall(nn.Module):
    """Calls a module with given parameters in the place of its own.

    A parameter that is used on both sides of a split must be rescaled at its deeper use alone, so that use
    reads it as a value. The module stays registered where it belongs; this one adds nothing to the state.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["_holder"] = (module,)  # in a tuple, or it would be registered
        self.__dict__["__module__"] = "torch.nn"  # so that other tracers keep it whole
        self.training = module.training

    @property
    def module(self) -> nn.Module:
        """The module that is called."""
        module: nn.Module = self.__dict__["_holder"][0]
        return module

    def forward(self, state: Mapping[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for ``args`` and ``kwargs``, its parameters ``state`` replaced by name."""
        return call_with(self.module, state, args, kwargs)


def parts_of(module: nn.Module) -> Iterable[nn.Module]:
    """A module and those in it, also where it is called with some of its parameters replaced."""
    return (module.module if isinstance(module, FunctionalCall) else module).modules()
