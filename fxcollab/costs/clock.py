"""What each node of a captured model takes on this machine, on real tensors."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.attribution import Attributed, Moment, Phase, backward
from fxcollab.errors import CaptureError, one_line
from fxcollab.functional import call_with, copied_state, named_tensors
from fxcollab.rng import preserve_rng_state
from fxcollab.tracing.examples import example_tensors
from fxcollab.tracing.interface import ExampleInputs, Interface
from fxcollab.tracing.preserve import preserved, replace_plain_tensors


def measured(
    captured: CollabGraphModule, model: nn.Module, interface: Interface, example_inputs: ExampleInputs | None
) -> Mapping[Moment, float]:
    """`node_seconds` on the example inputs, or on random ones of the shapes that ``interface`` knows.

    Raises:
        CaptureError: the model has no values, or fails on these inputs.
    """
    if example_inputs is None:
        inputs: Sequence[Any] = example_tensors(model, interface)
    else:
        inputs = interface.values_of(model, example_inputs)
    try:
        return node_seconds(captured, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # whatever a step raises on wrong values
        raise CaptureError(
            f"A training step of {type(model).__qualname__} fails on these inputs.",
            where=f"{type(model).__qualname__}.forward, in train mode",
            why=one_line(error),
            hint="give example_inputs whose values the model takes, or leave the measurement out",
        ) from error


def node_seconds(captured: CollabGraphModule, inputs: Sequence[Any], repeats: int = 5) -> Mapping[Moment, float]:
    """Seconds of every node of the train mode's graph, forward and backward: each the median of ``repeats`` steps.

    The steps run where the model lies, over copies of its tensors: they leave no gradient, no statistic and no random
    number drawn.

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
    taken: dict[Moment, list[float]] = {(p, n): [] for p in get_args(Phase) for n in captured.modes.train.nodes}
    with captured.in_mode(True), preserve_rng_state(), torch.inference_mode(False), torch.enable_grad():
        for _ in range(repeats + 1):
            with preserved(modules):
                replace_plain_tensors(modules, Tensor.clone)
                clock = _Clock(inputs)
                step = _Step(captured, clock)
                call_with(
                    step,
                    copied_state(step, _copy),
                    [value.clone() if isinstance(value, Tensor) else value for value in inputs],
                )
            for moment, seconds in taken.items():
                seconds.append(clock.seconds[moment])
    return {moment: statistics.median(seconds[1:]) for moment, seconds in taken.items()}


class _Step(nn.Module):
    """A forward and a backward, under a clock."""

    def __init__(self, captured: CollabGraphModule, clock: _Clock) -> None:
        super().__init__()
        self.model, self._clock = captured, clock

    def forward(self, *inputs: Any) -> None:
        backward(Attributed(self.model, self._clock.enter).run(*inputs))
        self._clock.enter(None)


class _Clock:
    """Sums up the time between one moment and the next."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.seconds: dict[Moment, float] = defaultdict(float)
        self._devices = {value.device for value in inputs if isinstance(value, Tensor) and value.is_cuda}
        self._moment: Moment | None = None
        self._since = 0.0

    def enter(self, moment: Moment | None) -> None:
        if moment == self._moment:
            return
        for device in self._devices:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self._moment is not None:
            self.seconds[self._moment] += now - self._since
        self._moment, self._since = moment, now


def _copy(tensor: Tensor) -> Tensor:
    """A forward may write into any tensor, and ask whether it is a parameter."""
    own = tensor.detach().clone()
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
