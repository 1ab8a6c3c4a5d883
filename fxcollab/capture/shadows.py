"""Example values for a graph under construction.

An opened forward may ask what a proxy can't tell: whether two sizes are equal, how long a tuple is, what a number is.
The answer is that of an example input, computed on fake tensors when it is first asked for. Sizes stay symbolic in
the graph; what was decided by the example is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from fxcollab.graphs import map_inputs


class Shadows:
    """The values that the nodes of one graph have for one example.

    Args:
        root: the module that targets refer to; its state is read as fake copies and never written.
        examples: the example of every placeholder, in order.
        constants: tensors that ``get_attr`` nodes name and that are no attributes of the root.
    """

    def __init__(self, root: nn.Module, examples: Sequence[Any], constants: dict[str, Tensor]) -> None:
        self._root, self._constants = root, constants
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, Tensor] = {}
        self._values: dict[fx.Node, Any] = {}
        self._inputs = [self._fake(example) for example in examples]

    def value(self, node: fx.Node) -> Any:
        """The example's value of ``node``; every node before it is computed first, in the graph's order."""
        with self._mode:
            for other in node.graph.nodes:
                if other not in self._values:
                    self._values[other] = self._evaluate(other)
                if other is node:
                    break
        return self._values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        args = map_inputs(node.args, self._values.__getitem__)
        kwargs = map_inputs(node.kwargs, self._values.__getitem__)
        target: Any = node.target
        match node.op:
            case "placeholder":
                return self._inputs.pop(0)
            case "get_attr":
                return self._fake(self._attribute(str(target)))
            case "call_function":
                return target(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case "call_module":
                module = self._root.get_submodule(str(target))
                return functional_call(module, self._state(module), args, kwargs)
        return None

    def _attribute(self, path: str) -> Any:
        if path in self._constants:
            return self._constants[path]
        owner, _, name = path.rpartition(".")
        return getattr(self._root.get_submodule(owner), name)

    def _state(self, module: nn.Module) -> dict[str, Tensor]:
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {name: self._fake(tensor) for name, tensor in named}

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._fakes:
            self._fakes[id(value)] = self._mode.from_tensor(value).detach()
        return self._fakes[id(value)]
