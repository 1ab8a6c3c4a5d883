"""Deep mutual learning (Zhang et al., 2018): each head learns from every other head by itself."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fxcollab.objectives.consensus import require_peers, sums_of_others
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

    shown = ("temperature", "weight", "detach", *Objective.shown)

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
        """The loss of every head; a regression's cost grows with the square of their number."""
        require_peers(heads)
        hard, task, temperature = self.labelled(heads, target), self.task, self.temperature
        peers, share = learnt_from(heads, self.detach), 1 / (len(heads) - 1)
        said = [task.distribution(t, temperature) for t in peers]
        own = [task.towards(q, t, temperature) for q, t in zip(said, peers, strict=True)]  # less it, it is the KL
        if task.linear:
            towards = [
                task.towards(q * share, z, temperature) for q, z in zip(sums_of_others(said), heads, strict=True)
            ]
        else:
            towards = [
                share * total([task.towards(q, z, temperature) for j, q in enumerate(said) if j != h])
                for h, z in enumerate(heads)
            ]
        entropies = [share * entropy for entropy in sums_of_others(own)]
        return [h + self.weight * (t - e) for h, t, e in zip(hard, towards, entropies, strict=True)]
