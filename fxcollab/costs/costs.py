"""The costs of a training graph beside those of its original, before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.attribution import Moment
from fxcollab.costs.profile import Profile
from fxcollab.costs.step import Placement, StepCost, step_cost


@dataclass(frozen=True)
class Costs:
    """One training step of a training graph, and one of its original. Ratios are of the first to the second.

    Attributes:
        original: of the original.
        training: of the training graph.
    """

    original: StepCost
    training: StepCost

    @property
    def measured(self) -> bool:
        """Whether times were measured."""
        return self.original.seconds is not None

    @property
    def time(self) -> float:
        """Of seconds, where measured, else of FLOPs; 1 where neither were counted."""
        return ratio(self.training.seconds or self.training.flops, self.original.seconds or self.original.flops)

    @property
    def flops(self) -> float:
        """Of floating point operations."""
        return ratio(self.training.flops, self.original.flops)

    @property
    def parameters(self) -> float:
        """Of parameters."""
        return ratio(self.training.parameters, self.original.parameters)

    @property
    def activations(self) -> float:
        """Of the bytes kept for the backward."""
        return ratio(self.training.activations, self.original.activations)

    @property
    def memory(self) -> float:
        """Of the peaks of memory."""
        return ratio(self.training.memory, self.original.memory)

    def to_json(self) -> dict[str, Any]:
        """Both steps and the ratios as plain data."""
        names = ("time", "flops", "parameters", "activations", "memory")
        return asdict(self) | {"ratios": {name: getattr(self, name) for name in names}}


def ratio(new: float, old: float) -> float:
    """``new`` to ``old``; 1 where both are nothing."""
    return new / old if old else 1.0


def parameter_count(model: nn.Module) -> int:
    """The number of values in all parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def costs_of(
    captured: CollabGraphModule,
    placement: Placement,
    profile: Profile,
    optimizer: float = 1.0,
    seconds: Mapping[Moment, float] | None = None,
) -> Costs:
    """What the training graph that ``placement`` leads to will cost.

    Args:
        captured: the captured original.
        placement: what belongs to which level.
        profile: that of its train mode's graph.
        optimizer: values that the optimizer holds for each trained one: 1 for SGD with momentum, 2 for Adam.
        seconds: what each node takes, forward and backward, where that was measured.
    """
    original = Placement.of_original(captured)
    return Costs(
        step_cost(captured, profile, original, optimizer, seconds),
        step_cost(captured, profile, placement, optimizer, seconds),
    )
