"""Which parameters of a model's forward become inputs of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab.errors import CaptureError

ExampleInputs = Sequence[Any] | Mapping[str, Any]
"""Example inputs of a call: a tuple of positional ones, or a dict of keyword ones."""


@dataclass(frozen=True)
class Interface:
    """The inputs of the graph, and what stays at its default.

    Attributes:
        inputs: names that become placeholders, in the order of the signature.
        fixed: names of optional parameters that are baked in at their defaults.
    """

    inputs: tuple[str, ...]
    fixed: tuple[str, ...]


def interface_of(
    model: nn.Module, example_inputs: ExampleInputs | None = None, names: Sequence[str] = ()
) -> Interface:
    """The interface under which ``model`` is captured.

    ``names`` are optional inputs to keep although no example of them is given.

    What has no default is an input. An optional parameter is an input only where ``example_inputs`` gives it:
    as a proxy it would answer ``if mask is None`` wrongly, and for good.

    Raises:
        CaptureError: the example inputs don't fit the signature.
    """
    signature = inspect.signature(model.forward)
    named = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    required = {name for name, parameter in named.items() if parameter.default is parameter.empty}
    given = required if example_inputs is None else set(_bind(signature, example_inputs, model))
    given |= set(names)
    unknown = given - named.keys()
    if unknown:
        raise CaptureError(
            f"Inputs {', '.join(sorted(unknown))} arrive through *args or **kwargs.",
            where=f"{type(model).__qualname__}.forward{signature}",
            why="only named parameters can become inputs of the graph",
            hint="wrap the model in a module whose forward names its inputs",
        )
    inputs = tuple(name for name in named if name in given | required)
    return Interface(inputs, tuple(name for name in named if name not in inputs))


@dataclass(frozen=True)
class InputSpec:
    """One input of a graph; shape and dtype are None where no example tensor was given for it."""

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def make(self, generator: torch.Generator) -> Tensor:
        """A random tensor like the example: standard normal, or 0 and 1 for integers and booleans.

        Raises:
            CaptureError: nothing is known of the input.
        """
        if self.shape is None or self.dtype is None:
            raise CaptureError(f"Nothing is known of input {self.name!r}.", hint="give example_inputs")
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(self.shape, dtype=dtype, generator=generator)
        return torch.randint(0, 2, self.shape, generator=generator).to(dtype)


def input_specs(
    model: nn.Module, example_inputs: ExampleInputs | None, names: Sequence[str] = ()
) -> tuple[InputSpec, ...]:
    """The inputs of the graph of ``model``, with shape and dtype where an example tensor is given."""
    bound = {} if example_inputs is None else _bind(inspect.signature(model.forward), example_inputs, model)
    return tuple(_spec(name, bound.get(name)) for name in interface_of(model, example_inputs, names).inputs)


def arguments(model: nn.Module, example_inputs: ExampleInputs) -> tuple[Any, ...]:
    """The example inputs as the positional arguments of the captured graph."""
    bound = _bind(inspect.signature(model.forward), example_inputs, model)
    return tuple(bound[name] for name in interface_of(model, example_inputs).inputs)


def _spec(name: str, example: Any) -> InputSpec:
    if not isinstance(example, Tensor):
        return InputSpec(name)
    return InputSpec(name, tuple(example.shape), str(example.dtype).removeprefix("torch."))


def _bind(signature: inspect.Signature, example_inputs: ExampleInputs, model: nn.Module) -> dict[str, Any]:
    try:
        if isinstance(example_inputs, Mapping):
            bound = signature.bind(**example_inputs)
        else:
            bound = signature.bind(*example_inputs)
    except TypeError as error:
        raise CaptureError(
            "The example inputs don't fit the model.",
            where=f"{type(model).__qualname__}.forward{signature}",
            why=str(error),
            hint="give a tuple of positional inputs or a dict of keyword inputs",
        ) from error
    return dict(bound.arguments)
