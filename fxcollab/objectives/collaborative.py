"""The objective of collaborative learning: equations 2 to 4 of the paper, summed over the heads.

    q_h = softmax(mean of the other heads' logits / T)                             (2)
    L_h = beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q_h, z_h)              (3)
    L   = L_1 + ... + L_H                                                          (4)

The regularisation term of equation 4 is the optimizer's weight decay.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fxcollab.objectives import closed_form
from fxcollab.objectives.consensus import consensus
from fxcollab.objectives.objective import Objective, Options, as_teachers, require_number, require_temperature
from fxcollab.objectives.tasks import is_plain_cross_entropy


class CollaborativeLoss(Objective):
    """The loss of collaborative learning: each head learns from the labels and from all other heads.

    The total over the heads h of ``beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q_h, z_h)`` (equations
    3 and 4). J_hard is the loss on the labels. J_soft is the cross entropy at temperature T between head h
    and the consensus q_h, the softmax of the other heads' mean logits (equation 2). The factor T^2 keeps the
    balance of the two when T changes (section 3.3).

    The soft term is summed over the classes and averaged over batch and positions. It needs no label, so positions
    that ``hard`` ignores (``ignore_index``) count in it like any other. In a multi-label task it is the binary cross
    entropy with the sigmoid of the same mean, in a regression the loss towards the mean.

    Half-precision logits are converted to float32, for ``hard`` too; float64 stays float64.

    Args:
        beta: weight of the labels against the consensus, in (0, 1]. With 1 the soft term is left out, and a single
            head is enough.
        temperature: T, finite and above 0. Higher is softer. A regression ignores it.
        detach: whether the consensus is a constant. With False gradient flows through it to the other heads.
        options: those of every `Objective`: task, hard, logits, reduction, finite. For label smoothing or ignored
            labels: ``hard=nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=255)``.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is not a loss of logits or reduces otherwise.

    Example:
        >>> loss = CollaborativeLoss(beta=0.5, temperature=2.0)(train_model(x), target)
        >>> loss.backward()
    """

    def __init__(
        self, beta: float = 0.5, temperature: float = 2.0, *, detach: bool = True, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        require_number(
            "beta",
            beta,
            lambda value: 0 < value <= 1,
            must_be="in (0, 1]",
            why="It weighs the labels against the consensus (equation 3); without labels nothing is learnt.",
            hint="The paper uses 0.5; 1 trains on the labels alone.",
        )
        require_temperature(temperature)
        self.beta = beta
        self.temperature = temperature
        self.detach = detach

    def losses(self, heads: list[Tensor], target: Tensor) -> list[Tensor]:
        """L_h of equation 3 for every head h."""
        hard = self.hard_losses(heads, target)
        if self.beta == 1:
            return hard
        teachers = consensus(as_teachers(heads, self.detach))
        soft = [self.task.distillation(t, z, self.temperature) for t, z in zip(teachers, heads, strict=True)]
        return [self.beta * h + (1 - self.beta) * s for h, s in zip(hard, soft, strict=True)]

    def total(self, heads: list[Tensor], target: Tensor) -> Tensor:
        """The sum over heads (equation 4), in closed form where possible."""
        plain = self.beta != 1 and self.detach and len(heads) > 1 and is_plain_cross_entropy(self.hard)
        if not plain or not isinstance(target, Tensor) or not closed_form.may_be_used(heads, target):
            return super().total(heads, target)
        target, by_operators = self.task.target(target, heads[0]), super().total
        return closed_form.loss(heads, target, self.beta, self.temperature, self.reduction == "mean", by_operators)
