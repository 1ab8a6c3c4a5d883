"""Example values for a graph under construction.

An opened forward may ask what a proxy can't tell: whether two sizes are equal, how long a tuple is, what a number is.
The answer is that of an example input, computed when it is first asked for: on fake tensors as far as shapes decide,
on real ones where data do. Sizes stay symbolic in the graph; what was decided by the example is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import FakeTensorMode, pytree
from fxcollab.functional import call_with, copied_state, once_each
from fxcollab.fx_utils import map_inputs, mutable
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.examples import without_tracebacks
from fxcollab.tracing.preserve import preserved


@dataclass(frozen=True, eq=False)
class Examples:
    """An example of every input, in order, and how its consequences are computed.

    Attributes:
        values: the examples.
        real: on copies of the model's real state, not on fake tensors.
    """

    values: Sequence[Any]
    real: bool = False


class ExampleValues:
    """The values that the nodes of one graph have for one example.

    Args:
        root: the module that targets refer to; its state is read as copies and never written.
        examples: the example of every placeholder.
        tensors: those that ``get_attr`` nodes name, as they were when the forward began.
    """

    def __init__(self, root: nn.Module, examples: Examples, tensors: Mapping[str, Tensor]) -> None:
        self._root, self._tensors = root, tensors
        self._mode = None if examples.real else FakeTensorMode(allow_non_fake_inputs=True)
        self._values: dict[fx.Node, Any] = {}
        self._copy = once_each(_copying(self._mode))
        self._inputs = [pytree.tree_map_only(Tensor, self._copy, value) for value in examples.values]

    @property
    def real(self) -> bool:
        """Whether values depend on the example's data, and not on its shapes alone."""
        return self._mode is None

    def value(self, node: fx.Node) -> Any:
        """The example's value of ``node``; every node before it is computed first, in the graph's order."""
        with self._computing():
            for other in node.graph.nodes:
                if other not in self._values:
                    self._values[other] = self._evaluate(other)
                if other is node:
                    break
        return self._values[node]

    def holders(self, node: fx.Node) -> tuple[str, ...] | None:
        """The nodes so far in whose values the list or dict that ``node`` stands for is found; None for a tensor."""
        container = self.value(node)
        if not isinstance(container, list | dict):
            return None
        return tuple(
            holder.name
            for holder, value in self._values.items()
            if any(inner is container for inner in _containers(value))
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with preserve_rng_state(), without_tracebacks(), self._mode or torch.no_grad():
            yield

    def _evaluate(self, node: fx.Node) -> Any:
        args = mutable(map_inputs(node.args, self._values.__getitem__))
        kwargs = mutable(map_inputs(node.kwargs, self._values.__getitem__))
        target: Any = node.target
        match node.op:
            case "placeholder":
                return self._inputs.pop(0)
            case "get_attr":
                return self._copy(self._tensors[str(target)])
            case "call_function":
                return target(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case "call_module":
                return self._called(str(target), args, kwargs)
        return None

    def _called(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        module = self._root.get_submodule(path)
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise UntraceableError(
                f"an example is needed behind {path}, which is scripted and runs on its own state only"
            )
        with preserved(module.modules()):  # what it sets now is no assignment of the traced forward
            return call_with(module, copied_state(module, self._copy), args, kwargs)


def _copying(mode: FakeTensorMode | None) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (tensor.clone() if mode is None else mode.from_tensor(tensor)).detach()


def _containers(value: Any) -> Iterator[Any]:
    """The lists and dicts in ``value``."""
    if isinstance(value, tuple | list | dict):
        yield from () if isinstance(value, tuple) else (value,)
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)
