"""What each node of a captured model takes on this machine, on real tensors."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxcollab.capture.preserve import preserved, replace_plain_tensors
from fxcollab.codegen import CollabGraphModule
from fxcollab.costs.attribution import Attributed, Moment, backward
from fxcollab.errors import CaptureError
from fxcollab.functional import call_with, named_tensors
from fxcollab.generators import undrawn


def node_seconds(captured: CollabGraphModule, inputs: Sequence[Tensor], repeats: int = 5) -> Mapping[fx.Node, float]:
    """Seconds of every node of the train mode's graph, forward and backward: the median of ``repeats`` steps.

    The steps run where the model lies, over its own parameters and copies of its buffers; they leave no gradient,
    no statistic and no random number drawn.

    Args:
        captured: a captured model with values.
        inputs: one for each of its inputs, on its device.
        repeats: steps that count; one more goes before them.

    Raises:
        CaptureError: the model has no values.
    """
    if any(tensor.is_meta for _, tensor in named_tensors(captured)):
        raise CaptureError(
            "A model on the meta device can't be measured.",
            why="its tensors have no values",
            hint="build it on a real device, or leave the measurement out: FLOPs stand for time",
        )
    modules = list(captured.modules())
    taken: dict[fx.Node, list[float]] = {node: [] for node in captured.modes.train.nodes}
    with captured.in_mode(True), undrawn(), torch.enable_grad():
        for _ in range(repeats + 1):
            with preserved(modules):
                for module in modules:
                    replace_plain_tensors(module, Tensor.clone)
                clock = _Clock(inputs)
                step = _Step(captured, clock)
                call_with(step, _lent_state(captured), [tensor.clone() for tensor in inputs])
            for node, seconds in taken.items():
                seconds.append(clock.seconds[node])
    return {node: statistics.median(seconds[1:]) for node, seconds in taken.items()}


class _Step(nn.Module):
    """A forward and a backward, under a clock."""

    def __init__(self, captured: CollabGraphModule, clock: _Clock) -> None:
        super().__init__()
        self.model, self._clock = captured, clock

    def forward(self, *inputs: Tensor) -> None:
        backward(Attributed(self.model, self._clock.enter).run(*inputs))
        self._clock.enter(None)


class _Clock:
    """Sums up the time between one moment and the next."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.seconds: dict[fx.Node, float] = defaultdict(float)
        self._devices = {tensor.device for tensor in inputs if tensor.is_cuda}
        self._moment: Moment | None = None
        self._since = 0.0

    def enter(self, moment: Moment | None) -> None:
        if moment == self._moment:
            return
        for device in self._devices:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self._moment is not None:
            self.seconds[self._moment[1]] += now - self._since
        self._moment, self._since = moment, now


def _lent_state(captured: CollabGraphModule) -> dict[str, Tensor]:
    """Parameters over the same memory that take gradients of their own, and copies of what a forward may write."""
    lent: dict[int, Tensor] = {}
    for _, tensor in named_tensors(captured):
        own = tensor.detach() if tensor.requires_grad else tensor.detach().clone()
        own = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
        lent.setdefault(id(tensor), own)
    return {f"model.{name}": lent[id(tensor)] for name, tensor in named_tensors(captured)}
