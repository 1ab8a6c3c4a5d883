"""Which parameters of a model's forward become inputs of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcollab._torch import pytree
from fxcollab.errors import CaptureError

ExampleInputs = Sequence[Any] | Mapping[str, Any]
"""Example inputs of a call: a tuple of positional ones, or a dict of keyword ones."""

FIXABLE = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class InputSpec:
    """One input of a graph.

    Attributes:
        name: that of the forward's parameter.
        shape: of the example tensor; None where none was given.
        dtype: of the example tensor, such as ``"float32"``.
        structured: whether the example was a list, a dict or another structure of tensors.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    structured: bool = False

    @classmethod
    def of(cls, name: str, example: Any) -> InputSpec:
        """What is known of an input from an example of it."""
        if not isinstance(example, Tensor):
            return cls(name, structured=example is not None)
        return cls(name, tuple(example.shape), str(example.dtype).removeprefix("torch."))

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


@dataclass(frozen=True)
class Interface:
    """The inputs of a graph, and what its forward's other parameters are fixed at.

    Attributes:
        inputs: what becomes a placeholder, in the order of the signature.
        fixed: given values that are no tensors, such as ``use_cache=False``; the graph holds them for good.
        defaults: names of optional parameters that stay at their defaults.
    """

    inputs: tuple[InputSpec, ...]
    fixed: tuple[tuple[str, Any], ...] = ()
    defaults: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether the shapes of all inputs are known."""
        return all(spec.shape is not None for spec in self.inputs)

    @property
    def structured(self) -> tuple[str, ...]:
        """The names of inputs that are a list, a dict or the like."""
        return tuple(spec.name for spec in self.inputs if spec.structured)

    def values_of(self, model: nn.Module, example_inputs: ExampleInputs) -> tuple[Any, ...]:
        """The inputs among the example's, in the order of the placeholders.

        Raises:
            CaptureError: they don't fit the signature.
        """
        bound = _bind(inspect.signature(model.forward), example_inputs, model)
        return tuple(bound[spec.name] for spec in self.inputs)

    def call(self, model: nn.Module, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with which ``model`` is called on ``values``, one for each input."""
        named = dict(zip((spec.name for spec in self.inputs), values, strict=True))
        return as_call(inspect.signature(model.forward), {**named, **dict(self.fixed)})


def forward_of(model: nn.Module) -> str:
    """The forward of a model with its signature, for messages."""
    return f"{type(model).__qualname__}.forward{inspect.signature(model.forward)}"


def interface_of(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Interface:
    """The interface under which ``model`` is captured.

    What has no default is an input, or, where all have defaults, what a model of transformers declares to be its main
    one. Any other optional parameter is an input only where ``example_inputs`` gives a tensor for it: as a proxy it
    would answer ``if mask is None`` wrongly, and for good. Given values that are no tensors are fixed.

    Raises:
        CaptureError: the example inputs don't fit the signature.
    """
    signature = inspect.signature(model.forward)
    named = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    given = {} if example_inputs is None else _bind(signature, example_inputs, model)
    _refuse_unnamed(given.keys() - named.keys(), model)
    fixed = {name: value for name, value in given.items() if _is_fixed(value)}
    required = {name for name, parameter in named.items() if parameter.default is parameter.empty}
    if not required and not given:
        required = {str(getattr(model, "main_input_name", ""))} & named.keys()
    inputs = [name for name in named if name in (given.keys() | required) - fixed.keys()]
    defaults = tuple(name for name in named if name not in inputs and name not in fixed)
    return Interface(tuple(InputSpec.of(name, given.get(name)) for name in inputs), tuple(fixed.items()), defaults)


def as_call(signature: inspect.Signature, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for a call: positional as far as they go without a gap, the rest by keyword."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        if name not in values:
            continue
        fits = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and len(positional) == index
        if fits or parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(values[name])
        else:
            keywords[name] = values[name]
    return positional, keywords


def _is_fixed(value: Any) -> bool:
    return all(isinstance(leaf, FIXABLE) for leaf in pytree.tree_leaves(value))


def _refuse_unnamed(names: set[str], model: nn.Module) -> None:
    if names:
        raise CaptureError(
            f"Inputs {', '.join(sorted(names))} arrive through *args or **kwargs.",
            where=forward_of(model),
            why="only named parameters can become inputs of the graph",
            hint="wrap the model in a module whose forward names its inputs",
        )


def _bind(signature: inspect.Signature, example_inputs: ExampleInputs, model: nn.Module) -> dict[str, Any]:
    try:
        if isinstance(example_inputs, Mapping):
            bound = signature.bind(**example_inputs)
        else:
            bound = signature.bind(*example_inputs)
    except TypeError as error:
        raise CaptureError(
            "The example inputs don't fit the model.",
            where=forward_of(model),
            why=str(error),
            hint="give a tuple of positional inputs or a dict of keyword inputs",
        ) from error
    return dict(bound.arguments)
