"""What a model costs, counted on fake tensors: no memory, no change of state."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxcollab.capture.interface import InputSpec
from fxcollab.inputs import example_tensors, run_on_fakes


def forward_flops(model: nn.Module, inputs: Sequence[InputSpec]) -> int:
    """Floating point operations of one forward call in the present mode, as ``FlopCounterMode`` counts them."""
    counter = FlopCounterMode(display=False)
    run_on_fakes(model, example_tensors(inputs), counter)
    return int(counter.get_total_flops())


def parameter_count(model: nn.Module) -> int:
    """The number of values in all parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
