"""What a model costs, counted on fake tensors: no memory, no change of state."""

from __future__ import annotations

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxcollab.capture.examples import run_on_fakes
from fxcollab.capture.interface import Interface


def forward_flops(model: nn.Module, interface: Interface) -> int:
    """Floating point operations of one forward call in the present mode, as ``FlopCounterMode`` counts them."""
    counter = FlopCounterMode(display=False)
    run_on_fakes(model, interface, counter)
    return int(counter.get_total_flops())


def parameter_count(model: nn.Module) -> int:
    """The number of values in all parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
