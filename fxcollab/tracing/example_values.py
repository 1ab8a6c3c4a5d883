"""Example values for a graph that is being traced.

An opened forward may need what a proxy doesn't have: whether two sizes are equal, the length of a tuple, a number.
Then it gets the value for an example input, computed when it is first needed: on fake tensors if shapes decide, on
real ones if data do. Sizes stay symbolic in the graph; what was decided by the example is noted.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree
from fxcollab.errors import one_line
from fxcollab.fx_utils import attribute, map_inputs, mutable
from fxcollab.rng import GeneratorState
from fxcollab.runtime.operators import writes_in_place
from fxcollab.tracing.errors import UntraceableError
from fxcollab.tracing.twin import twin_of

DRAWS, FEW_DRAWS = 64, 8
"""How often random numbers are drawn again to see whether an answer depends on them, without and with modules."""


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
        self._drawn: set[fx.Node] = set()  # those whose values depend on random numbers
        self._drawn_values: list[dict[fx.Node, Any]] = [{} for _ in range(DRAWS)]  # theirs with other numbers
        self._twin = twin_of(model, training, real=examples.real)
        self._inputs = [pytree.tree_map_only(Tensor, self._twin.stand_in, value) for value in examples.values]

    def given(self) -> list[Any]:
        """The tensors of the twin, and the example's inputs."""
        return [*(copied for _, copied in self._twin.tensors), *self._inputs]

    @property
    def real(self) -> bool:
        """Whether values depend on the example's data, and not only on its shapes."""
        return self._real

    def value(self, node: fx.Node) -> Any:
        """The example value of ``node``; those of the nodes before it are computed first, in the graph's order."""
        with self._twin.computing(), torch.enable_grad():
            for other in node.graph.nodes:
                if other not in self._values:
                    before = GeneratorState() if self.real else None
                    self._values[other] = self._evaluate(other)
                    if before is not None and (before.numbers_were_drawn() or self._reads_drawn(other)):
                        self._drawn.add(other)
                        if writes_in_place(other.target, other.kwargs):
                            self._drawn.update(other.all_input_nodes[:1])
                if other is node:
                    break
        return self._values[node]

    def drawn(self, node: fx.Node, question: Callable[[Any], Any]) -> bool:
        """Whether the answer to a question about a computed value differs with the forward's random numbers."""
        if node not in self._drawn or _is_known_without_data(question, self._values[node]):
            return False
        answer, needed = question(self._values[node]), {node}
        for other in (*reversed(node.graph.nodes), *reversed(node.graph.nodes)):  # twice: writes come after the value
            writes = writes_in_place(other.target, other.kwargs) and other.all_input_nodes[0] in needed
            if other in needed or writes:
                needed.update({other}, (source for source in other.all_input_nodes if source in self._drawn))
        order = [other for other in node.graph.nodes if other in needed and other.op.startswith("call")]
        draws = FEW_DRAWS if any(other.op == "call_module" for other in order) else DRAWS
        with self._twin.computing(), torch.no_grad():  # there are many, whose gradients nobody asks for
            again = (self._drawn_again(node, order, question, found) for found in self._drawn_values[:draws])
            return any(other != answer for other in again)

    def _drawn_again(
        self, asked: fx.Node, order: Sequence[fx.Node], question: Callable[[Any], Any], found: dict[fx.Node, Any]
    ) -> Any:
        values = ChainMap(found, self._values)
        try:
            for node in order:
                if node not in found:
                    values[node] = self._evaluate(node, values)
            return question(values[asked])
        except Exception as error:  # user code may raise anything, for what was drawn
            raise UntraceableError(f"with other random numbers {node.name!r} raises {one_line(error)}") from error

    def _reads_drawn(self, node: fx.Node) -> bool:
        """Whether the value depends on random numbers by those of other nodes, and not on their shapes alone."""
        drawn = [self._values[other] for other in node.all_input_nodes if other in self._drawn]
        if not drawn or node.op == "call_module" or _has_tensors(self._values[node]):
            return bool(drawn)
        values = {other: self._values[other] for other in node.all_input_nodes}
        return not _is_known_without_data(lambda inputs: self._evaluate(node, inputs), values)

    def _evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any] | None = None) -> Any:
        values = self._values if values is None else values
        args = mutable(map_inputs(node.args, values.__getitem__))
        kwargs = mutable(map_inputs(node.kwargs, values.__getitem__))
        target: Any = node.target
        match node.op:
            case "placeholder":
                return self._inputs.pop(0)
            case "get_attr":
                tensor = self._tensors.get(str(target))  # or a module or an object that is handed to a call
                return attribute(self._twin.model, target) if tensor is None else self._twin.stand_in(tensor)
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


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _is_known_without_data(function: Callable[[Any], Any], value: Any) -> bool:
    """Whether ``function`` returns the same for all data, such as a shape: tensors on meta have none."""
    if not _has_tensors(value):
        return False
    try:
        function(pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value))
    except Exception:  # user code may raise anything on them
        return False
    return True
