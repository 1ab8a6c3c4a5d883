"""Which parameters of a model's forward become inputs of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

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


def interface_of(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Interface:
    """The interface under which ``model`` is captured.

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
    given = required if example_inputs is None else _given(signature, example_inputs, model)
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


def positional(model: nn.Module, example_inputs: ExampleInputs) -> tuple[Any, ...]:
    """The example inputs as the tuple of arguments that the captured graph takes."""
    bound = _bind(inspect.signature(model.forward), example_inputs, model)
    return tuple(bound[name] for name in interface_of(model, example_inputs).inputs if name in bound)


def _given(signature: inspect.Signature, example_inputs: ExampleInputs, model: nn.Module) -> set[str]:
    return set(_bind(signature, example_inputs, model))


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
