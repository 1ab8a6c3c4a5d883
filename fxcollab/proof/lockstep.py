"""Run a training graph so that every head draws the random numbers that the original would draw alone.

In the training graph the instances of one node stand side by side and draw one after the other. To compare a
head with an original bit for bit, each instance starts from the generator state in which the first one started.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.fx_utils import Interpreter
from fxcollab.provenance import provenance
from fxcollab.rng import GeneratorState


class Lockstep(nn.Module):
    """The training model, interpreted node by node; registered as ``model``, so that its state can be replaced.

    Args:
        model: the training model.
        together: whether all instances of a node draw the same numbers; else they draw as they come.
    """

    def __init__(self, model: CollabGraphModule, *, together: bool = True) -> None:
        super().__init__()
        self.model, self._together = model, together

    def forward(self, *inputs: Any) -> Any:
        """The tuple of outputs."""
        return (_InStep if self._together else Interpreter)(self.model).run(*inputs)


class _InStep(Interpreter):
    def __init__(self, model: CollabGraphModule) -> None:
        super().__init__(model)
        self._started: dict[str, GeneratorState] = {}

    def run_node(self, n: fx.Node) -> Any:
        origin = provenance(n)
        if not origin.inserted and n.op not in ("placeholder", "output", "get_attr"):
            if origin.origin in self._started:
                self._started[origin.origin].restore()
            else:
                self._started[origin.origin] = GeneratorState()
        return super().run_node(n)
