"""Run a training graph so that every head draws the random numbers that the original would draw alone.

In the training graph the instances of one node draw one after the other. To compare a head with an original bit for
bit, each instance starts from the generator state in which the original's node starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcollab._torch import pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import StateError
from fxcollab.fx_utils import Interpreter
from fxcollab.plan import plan_of
from fxcollab.provenance import provenance_of
from fxcollab.rewriting.prune import prune
from fxcollab.rng import GeneratorState, preserve_rng_state
from fxcollab.tracing.preserve import preserved


class Lockstep(nn.Module):
    """The training model, interpreted node by node; registered as ``model``, so that its state can be replaced.

    Args:
        model: the training model.
        together: whether all instances of a node draw the numbers that the original's node draws; else they draw as
            they come.
    """

    def __init__(self, model: CollabGraphModule, *, together: bool = True) -> None:
        super().__init__()
        self.model, self._together = model, together

    def forward(self, *inputs: Any) -> Any:
        """The tuple of outputs."""
        if not self._together:
            return Interpreter(self.model).run(*inputs)
        return _InStep(self.model, _starts(self.model, inputs)).run(*inputs)


def _starts(model: CollabGraphModule, inputs: Sequence[Any]) -> dict[str, GeneratorState]:
    """The state of the generators before each node of the original, which runs once; its buffers are put back."""
    try:
        recorder = _Recorder(prune(model))
    except StateError:  # the heads are no longer apart, which the proof of the structure says
        return {}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    with preserve_rng_state(), torch.no_grad(), preserved(model.modules()):
        recorder.run(*pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(inputs)))
        for buffer, before in buffers.items():
            buffer.copy_(before)
    return recorder.starts


class _Recorder(Interpreter):
    def __init__(self, model: CollabGraphModule) -> None:
        super().__init__(model)
        self.starts: dict[str, GeneratorState] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.starts[n.name] = GeneratorState()
        return super().run_node(n)


class _InStep(Interpreter):
    def __init__(self, model: CollabGraphModule, starts: Mapping[str, GeneratorState]) -> None:
        super().__init__(model)
        self._starts = starts
        self._provenance = provenance_of(model.graph, plan_of(model).options.peers)

    def run_node(self, n: fx.Node) -> Any:
        found = self._provenance[n]
        if not found.inserted and n.op.startswith("call") and found.origin in self._starts:
            self._starts[found.origin].restore()
        return super().run_node(n)
