"""Example values for a graph that is being traced.

An opened forward may need what a proxy doesn't have: whether two sizes are equal, the length of a tuple, a number.
Then it gets the value for an example input, computed when it is first needed: on fake tensors if shapes decide, on
real ones if data do. Sizes stay symbolic in the graph; what was decided by the example is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree
from fxcollab.fx_utils import map_inputs, mutable
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.twin import twin_of


@dataclass(frozen=True, eq=False)
class Examples:
    """An example of each input; with ``real``, values are computed on copies of the model's state, not on fakes."""

    values: Sequence[Any]
    real: bool = False


class ExampleValues:
    """The values of a graph's nodes for one example of its placeholders, computed on a twin of ``model``.

    ``tensors`` has those of the ``get_attr`` nodes by name; ``training`` is the twin's mode.
    """

    def __init__(
        self, model: nn.Module, training: bool | None, examples: Examples, tensors: Mapping[str, Tensor]
    ) -> None:
        self._tensors, self._real = tensors, examples.real
        self._values: dict[fx.Node, Any] = {}
        self._twin = twin_of(model, training, real=examples.real)
        self._inputs = [pytree.tree_map_only(Tensor, self._twin.stand_in, value) for value in examples.values]

    @property
    def real(self) -> bool:
        """Whether values depend on the example's data, and not only on its shapes."""
        return self._real

    def value(self, node: fx.Node) -> Any:
        """The example value of ``node``; those of the nodes before it are computed first, in the graph's order."""
        with self._twin.running(), torch.no_grad():
            for other in node.graph.nodes:
                if other not in self._values:
                    self._values[other] = self._evaluate(other)
                if other is node:
                    break
        return self._values[node]

    def containers_of(self, node: fx.Node) -> tuple[str, ...] | None:
        """The nodes so far whose values have the list or dict of ``node`` in them; None for a tensor."""
        container = self.value(node)
        if not isinstance(container, list | dict):
            return None
        return tuple(
            other.name
            for other, value in self._values.items()
            if any(inner is container for inner in _containers(value))
        )

    def _evaluate(self, node: fx.Node) -> Any:
        args = mutable(map_inputs(node.args, self._values.__getitem__))
        kwargs = mutable(map_inputs(node.kwargs, self._values.__getitem__))
        target: Any = node.target
        match node.op:
            case "placeholder":
                return self._inputs.pop(0)
            case "get_attr":
                return self._twin.stand_in(self._tensors[str(target)])
            case "call_function":
                return target(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case "call_module":
                return self._module(str(target))(*args, **kwargs)
        return None

    def _module(self, path: str) -> nn.Module:
        module = self._twin.model.get_submodule(path)
        if not self._real and any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise UntraceableError(f"an example value is needed behind {path}, which is scripted and needs real ones")
        return module


def _containers(value: Any) -> Iterator[Any]:
    """The lists and dicts in ``value``."""
    if isinstance(value, tuple | list | dict):
        yield from () if isinstance(value, tuple) else (value,)
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)
