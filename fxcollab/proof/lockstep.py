"""Run a training graph so that every head draws the random numbers that the original would draw alone.

In the training graph the instances of one node draw one after the other. To compare a head with an original bit for
bit, each instance starts from the generator state in which the original's node starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    All instances of a node draw the numbers that the original's node draws; with ``together=False`` they draw one
    after the other, as the generated code does.
    """

    def __init__(self, model: CollabGraphModule, *, together: bool = True) -> None:
        super().__init__()
        self.model, self._together = model, together

    def forward(self, *inputs: Any) -> Any:
        """The tuple of outputs."""
        provenance = provenance_of(self.model.graph, plan_of(self.model).options.peers)
        starts = _starts(self.model, inputs) if self._together else {}

        def restore(node: fx.Node) -> None:
            found = provenance[node]
            if not found.inserted and node.op.startswith("call") and found.origin in starts:
                starts[found.origin].restore()

        return _Hooked(self.model, restore).run(*inputs)


def cloned(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The inputs for one run, which may write into them; gradients reach the given ones."""
    return tuple(pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(inputs)))


def _starts(model: CollabGraphModule, inputs: Sequence[Any]) -> dict[str, GeneratorState]:
    """The state of the generators before each node of the original, which runs once; buffers are restored."""
    try:
        original = prune(model)
    except StateError:  # the heads are no longer apart, which the check of the structure reports
        return {}
    starts: dict[str, GeneratorState] = {}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    with preserve_rng_state(), torch.no_grad(), preserved(model.modules()):
        _Hooked(original, lambda node: starts.update({node.name: GeneratorState()})).run(*cloned(inputs))
        for buffer, before in buffers.items():
            buffer.copy_(before)
    return starts


class _Hooked(Interpreter):
    """Calls ``before`` with every node that is about to run."""

    def __init__(self, model: fx.GraphModule, before: Callable[[fx.Node], None]) -> None:
        super().__init__(model)
        self._before = before

    def run_node(self, n: fx.Node) -> Any:
        self._before(n)
        return super().run_node(n)
