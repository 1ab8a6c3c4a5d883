"""Deep mutual learning (Zhang et al., 2018): each head learns from every other head by itself."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fxcollab.objectives import options
from fxcollab.objectives.consensus import require_peers, sums_of_others
from fxcollab.objectives.objective import Options, as_teachers, total
from fxcollab.objectives.options import switch
from fxcollab.objectives.two_terms import TwoTerms


class MutualLoss(TwoTerms):
    """The loss of deep mutual learning: labels, and the divergence from each peer.

    The total over the heads h of ``J_hard(y, z_h) + weight * T^2 * mean over j != h of KL(p_j || p_h)``, p being the
    softmax at temperature T. Its authors update the heads in turns, for which `per_head` has the losses.

    Args:
        temperature: T, finite and above 0 (default 1, as in its paper).
        weight: of the divergence against the labels, at least 0 (default 1).
        detach: whether peers are constants to the head that learns from them (default True).
        options: those of every `Objective`: task, hard, logits, tokens, consensus_on, reduction, finite.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is not a loss of logits or reduces otherwise.
    """

    weight = options.weight("the divergence between heads", "the loss on the labels")

    def __init__(
        self, temperature: float = 1.0, weight: float = 1.0, *, detach: bool = True, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.weight = weight
        self.detach = switch("detach", detach)

    @property
    def weights(self) -> tuple[float, float]:
        """Of the labels and of the divergence."""
        return 1.0, self.weight

    def soft_terms(self, heads: list[Tensor], target: Tensor | None) -> list[Tensor]:
        """Every head's mean divergence from its peers; a regression's cost grows with the square of their number."""
        require_peers(heads)
        task, temperature = self.task, self.temperature
        peers, share = as_teachers(heads, self.detach), 1 / (len(heads) - 1)
        distributions = [task.distribution(z, temperature) for z in peers]
        entropies = [task.soft_loss(q, z, temperature) for q, z in zip(distributions, peers, strict=True)]
        if task.linear:
            means = [q * share for q in sums_of_others(distributions)]
            soft = [task.soft_loss(q, z, temperature) for q, z in zip(means, heads, strict=True)]
        else:
            soft = [
                share * total([task.soft_loss(q, z, temperature) for j, q in enumerate(distributions) if j != h])
                for h, z in enumerate(heads)
            ]
        # The KL divergence is the cross entropy less the teacher's own entropy.
        return [s - share * entropy for s, entropy in zip(soft, sums_of_others(entropies), strict=True)]
