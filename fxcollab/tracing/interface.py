"""Which parameters of a model's forward become inputs of the graph."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import base_types

from fxcollab._torch import pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import CaptureError
from fxcollab.limits import check_name, check_shape

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""Example inputs of a call: one tensor, a tuple of positional inputs, or a dict of keyword ones."""

_FIXABLE = (type(None), bool, int, float, str)
_WRITABLE = (*base_types, type(None), Enum)


def or_default(value: Any, default: Any) -> Any:
    """``value``, or ``default`` for None: generated code can't have a tensor as the default of a parameter."""
    return default if value is None else value


@dataclass(frozen=True)
class InputSpec:
    """One input of a graph: a parameter of the forward, and what is known of it from an example."""

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None  # such as "float32"
    structured: bool = False  # a list, a dict or another structure of tensors

    @classmethod
    def of(cls, name: str, example: Any) -> InputSpec:
        """The input with the shape and dtype of ``example``; they stay unknown if it is None."""
        if not isinstance(example, Tensor):
            return cls(name, structured=example is not None)
        return cls(name, tuple(example.shape), str(example.dtype).removeprefix("torch."))

    def checked(self) -> InputSpec:
        """The same.

        Raises:
            LimitError, ValueError: no memory holds it, or a size is below zero.
            CaptureError: values of its type can't be drawn.
        """
        check_shape(self.name, self.shape or ())
        try:
            if self.shape is not None:
                replace(self, shape=(1,)).make(torch.Generator())
        except (RuntimeError, NotImplementedError, TypeError) as error:  # as torch has it, type by type
            hint = "give a type whose values can be drawn, such as float32, bfloat16 or int64"
            raise CaptureError(f"Inputs of type {self.dtype} can't be made.", why=str(error), hint=hint) from error
        return self

    def size_in_bytes(self) -> int:
        """Of a tensor like the example; 0 where its shape is not known."""
        dtype: torch.dtype = getattr(torch, self.dtype or "int64")
        return math.prod(self.shape or (0,)) * dtype.itemsize

    def make(self, generator: torch.Generator) -> Tensor:
        """A random tensor like the example: standard normal, or 0 and 1 for integers and booleans."""
        if self.shape is None or self.dtype is None:
            raise CaptureError(f"The shape of input {self.name!r} is not known.", hint="give example_inputs")
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(self.shape, dtype=dtype, generator=generator)
        return torch.randint(0, 2, self.shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Interface:
    """The inputs of a graph, and the values at which the other parameters of the forward are fixed."""

    inputs: tuple[InputSpec, ...]  # the placeholders, in the order of the signature
    fixed: tuple[tuple[str, Any], ...] = ()  # given values that are not tensors, such as use_cache=False

    def __post_init__(self) -> None:
        """Raise a `CaptureError` for names that generated code could not have, or that would be code themselves."""
        for name in (*(spec.name for spec in self.inputs), *dict(self.fixed)):
            check_name(name, "an input")
            if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
                raise CaptureError(
                    f"An input can't be called {name!r}.",
                    why="the generated forward has a parameter of that name",
                    hint="give the forward inputs with names that Python has for parameters",
                )

    @property
    def known(self) -> bool:
        """Whether the shapes of all inputs are known."""
        return all(spec.shape is not None for spec in self.inputs)

    @property
    def structured(self) -> tuple[str, ...]:
        """The names of structured inputs."""
        return tuple(spec.name for spec in self.inputs if spec.structured)

    def values_of(self, model: nn.Module, example_inputs: ExampleInputs) -> tuple[Any, ...]:
        """The examples of the inputs, in the order of the placeholders."""
        bound = _bind(inspect.signature(model.forward), example_inputs, model)
        return tuple(bound[spec.name] for spec in self.inputs)

    def default_values(self, signature: inspect.Signature) -> dict[str, Any]:
        """Defaults of the last inputs that generated code can have; none precedes an input without one."""
        found: dict[str, Any] = {}
        for spec in reversed(self.inputs):
            parameter = signature.parameters.get(spec.name)
            if parameter is None or not all(isinstance(x, _WRITABLE) for x in pytree.tree_leaves(parameter.default)):
                break
            found[spec.name] = parameter.default
        return found

    def fixed_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Parameters of the forward that are no inputs, with the values they stay at."""
        parameters = inspect.signature(model.forward).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        inputs = {spec.name for spec in self.inputs}
        return {name: value for name, value in {**defaults, **dict(self.fixed)}.items() if name not in inputs}

    def check(self, model: nn.Module) -> None:
        """Raise a `CaptureError` where the forward has no such parameters."""
        signature = inspect.signature(model.forward)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        names = [*(spec.name for spec in self.inputs), *dict(self.fixed)]
        unknown = [name for name in names if name not in signature.parameters]
        if unknown and not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
            raise CaptureError(
                f"The forward has no parameter {', '.join(unknown)}.",
                where=forward_of(model),
                hint="give the interface of a capture of this model",
            )

    def call(self, model: nn.Module, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keyword arguments for a call of ``model`` on ``values``, one for each input."""
        named = dict(zip((spec.name for spec in self.inputs), values, strict=True))
        # A graph takes what the model takes that it was captured from.
        forward = (model.root if isinstance(model, CollabGraphModule) else model).forward
        return as_call(inspect.signature(forward), {**named, **dict(self.fixed)})


def forward_of(model: nn.Module) -> str:
    """A model's forward with its signature, for messages."""
    return f"{type(model).__qualname__}.forward{inspect.signature(model.forward)}"


def interface_of(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Interface:
    """The interface under which ``model`` is captured.

    Parameters without a default are inputs, or, where all have one, the main input that a model of transformers
    declares. Any other is an input only if ``example_inputs`` has a tensor for it: with a proxy, ``if mask is None``
    is always false. Given values that are not tensors are fixed.
    """
    signature = inspect.signature(model.forward)
    given = {} if example_inputs is None else _bind(signature, example_inputs, model)
    named = _names(signature, given)
    fixed = {
        name: value
        for name, value in given.items()
        if all(isinstance(leaf, _FIXABLE) for leaf in pytree.tree_leaves(value))
        and not isinstance(model, fx.GraphModule)  # whose graph has an input for each
    }
    required = {
        name for name in named if name in given or signature.parameters[name].default is inspect.Parameter.empty
    }
    if not required:
        required = {str(getattr(model, "main_input_name", ""))} & {*named}
    inputs = [name for name in named if name in required - fixed.keys()]
    return Interface(tuple(InputSpec.of(name, given.get(name)) for name in inputs), tuple(fixed.items()))


def as_call(signature: inspect.Signature, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and keyword arguments for a call: positional up to the first parameter without a value.

    Values for which a forward, such as that of a graph, has no parameter are left out.
    """
    positional: list[Any] = []
    keywords = dict(values)
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [keywords.pop(each) for each in takewhile(values.__contains__, _names_of(signature, name))]
        fits = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and len(positional) == index
        if name in values and (fits or parameter.kind is parameter.POSITIONAL_ONLY):
            positional.append(keywords.pop(name))
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        keywords = {name: value for name, value in keywords.items() if name in signature.parameters}
    return positional, keywords


def _names(signature: inspect.Signature, given: Mapping[str, Any]) -> list[str]:
    """The parameters; ``*xs`` as ``xs_0``, ``xs_1``, ..., and ``**kwargs`` by the names that are given."""
    names: list[str] = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += takewhile(given.__contains__, _names_of(signature, name))
        elif parameter.kind is not parameter.VAR_KEYWORD:
            names.append(name)
    return list(dict.fromkeys((*names, *given)))


def _names_of(signature: inspect.Signature, name: str) -> Iterator[str]:
    """``xs_0``, ``xs_1``, ... for ``*xs``, with more underscores where a parameter is called like this."""
    prefix = f"{name}_"
    while any(other.startswith(prefix) for other in signature.parameters):
        prefix += "_"
    return (f"{prefix}{index}" for index in count())


def _bind(signature: inspect.Signature, example_inputs: ExampleInputs, model: nn.Module) -> dict[str, Any]:
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    named, positional = ({}, example_inputs) if not isinstance(example_inputs, Mapping) else (example_inputs, ())
    try:
        bound = dict(signature.bind(*positional, **named).arguments)
    except TypeError as error:
        raise CaptureError(
            "The example inputs don't fit the model.",
            where=forward_of(model),
            why=str(error),
            hint="give a tuple of positional inputs or a dict of keyword inputs (--input once for each of them)",
        ) from error
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            bound |= zip(_names_of(signature, name), bound.pop(name, ()), strict=False)
        elif parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound
