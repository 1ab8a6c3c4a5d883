"""Deep mutual learning (Zhang et al., 2018): each head learns from every other head by itself."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fxcollab.objectives.consensus import require_peers
from fxcollab.objectives.objective import Objective, Options, learnt_from, require_temperature, require_weight, total


class MutualLoss(Objective):
    """The loss of deep mutual learning: labels, and the divergence from each peer.

    The total over the heads h of ``J_hard(y, z_h) + weight * T^2 * mean over j != h of KL(p_j || p_h)``, p being the
    softmax at temperature T. Its authors update heads in turns; `per_head` is what that takes.

    Args:
        temperature: T, finite and above 0; 1 as in its paper.
        weight: of the divergence against the labels, at least 0.
        detach: whether peers are constants to the head that learns from them.
        options: those of every `Objective`: task, hard, logits, reduction, finite.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is no loss or reduces otherwise.
    """

    options = ("temperature", "weight", "detach", *Objective.options)

    def __init__(
        self, temperature: float = 1.0, weight: float = 1.0, *, detach: bool = True, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        require_temperature(temperature)
        require_weight(weight, "weight")
        self.temperature = temperature
        self.weight = weight
        self.detach = detach

    def losses(self, heads: list[Tensor], target: Tensor) -> list[Tensor]:
        """The loss of every head; the cost grows with the square of their number."""
        require_peers(heads)
        hard, teachers, temperature = self.labelled(heads, target), learnt_from(heads, self.detach), self.temperature
        own = [self.task.soft(t, t, temperature) for t in teachers]  # the entropy: cross entropy less it is the KL
        learnt = (
            total([self.task.soft(t, z, temperature) - own[j] for j, t in enumerate(teachers) if j != h])
            for h, z in enumerate(heads)
        )
        share = self.weight / (len(heads) - 1)
        return [h + share * divergence for h, divergence in zip(hard, learnt, strict=True)]
