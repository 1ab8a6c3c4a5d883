"""What a training step may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxcollab.costs.costs import Costs


@dataclass(frozen=True)
class Budget:
    """Ratios to the original's; infinite where nothing was asked.

    Attributes:
        time: of a step, by FLOPs unless measured.
        memory: of the peak of a step.
    """

    time: float = math.inf
    memory: float = math.inf

    def why_not(self, costs: Costs) -> str | None:
        """How ``costs`` exceed it; None where they keep within."""
        over = [
            f"{found:.2f}x the {name} is over {limit:g}x"
            for name, found, limit in (("time", costs.time, self.time), ("memory", costs.memory, self.memory))
            if found > limit
        ]
        return " and ".join(over) or None

    def excess(self, time: float, memory: float) -> float:
        """How many times over the budget the worse of both is."""
        return max(time / self.time, memory / self.memory)

    def __str__(self) -> str:
        limits = (("time", self.time), ("memory", self.memory))
        return " and ".join(f"{limit:g}x the {name}" for name, limit in limits if limit < math.inf)
