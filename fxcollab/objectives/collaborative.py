"""The objective of collaborative learning: equations 2 to 4 of the paper, summed over the heads.

    q_h = softmax(mean of the other heads' logits / T)                             (2)
    L_h = beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q_h, z_h)              (3)
    L   = L_1 + ... + L_H                                                          (4)

The regularisation term of equation 4 is the optimizer's weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from fxcollab.errors import ObjectiveError
from fxcollab.objectives import closed_form, options
from fxcollab.objectives import hidden as hidden_states
from fxcollab.objectives.consensus import consensus
from fxcollab.objectives.hard_loss import ignored_label, is_plain_cross_entropy
from fxcollab.objectives.objective import Options, as_teachers
from fxcollab.objectives.options import switch
from fxcollab.objectives.outputs import logits_of_heads, warn_of_shared
from fxcollab.objectives.tokens import flat_labels
from fxcollab.objectives.two_terms import TwoTerms


class CollaborativeLoss(TwoTerms):
    """The loss of collaborative learning: each head learns from the labels and from all other heads.

    The total over the heads h of ``beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q_h, z_h)`` (equations
    3 and 4). J_hard is the loss on the labels. J_soft is the cross entropy at temperature T between head h
    and the consensus q_h, the softmax of the other heads' mean logits (equation 2). The factor T^2 keeps the
    balance of the two when T changes (section 3.3).

    The soft term is summed over the classes and averaged over the positions on which heads learn from each other:
    those that have a label, unless ``consensus_on`` says otherwise; all of a batch without labels. In a multi-label
    task it is the binary cross entropy with the sigmoid of the same mean, in a regression the loss towards the mean.

    Half-precision logits are converted to float32, for ``hard`` too; float64 stays float64.

    ``beta``, ``hard_weight``, ``soft_weight`` and ``temperature`` can be set during training.

    Args:
        beta: weight of the labels against the consensus, in (0, 1] (default 0.5). With 1 the soft term is left out,
            and a single head is enough.
        temperature: T, finite and above 0 (default 2). Higher is softer. A regression ignores it.
        hard_weight, soft_weight: weights of the two terms in place of ``beta`` and ``1 - beta``, finite and at least
            0 (default 1 each where one of them is given).
        detach: whether the consensus is a constant (default True). With False gradient flows through it to the other
            heads.
        class_weights: whether the soft term weighs classes as ``hard`` does, which has a ``weight``, in a multi-label
            task a ``pos_weight`` (default False). The mean is over positions, as torch's is for soft labels.
        options: those of every `Objective`: task, hard, logits, tokens, consensus_on, reduction, finite. For label
            smoothing or ignored labels: ``hard=nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=255)``.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is not a loss of logits or reduces otherwise.

    Example:
        >>> loss = CollaborativeLoss(beta=0.5, temperature=2.0)(train_model(x), target)
        >>> loss.backward()
        >>> ramp = CollaborativeLoss(hard_weight=1.0, soft_weight=0.0)
        >>> ramp.soft_weight = min(1.0, epoch / 10)
    """

    hard_weight = options.weight("the labels", "the consensus")
    soft_weight = options.weight("the consensus", "the labels", "0 trains on the labels alone.")

    def __init__(
        self,
        beta: float | None = None,
        temperature: float = 2.0,
        *,
        hard_weight: float | None = None,
        soft_weight: float | None = None,
        detach: bool = True,
        class_weights: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        if hard_weight is None and soft_weight is None:
            self.beta = 0.5 if beta is None else beta
        elif beta is None:
            self.hard_weight = 1.0 if hard_weight is None else hard_weight
            self.soft_weight = 1.0 if soft_weight is None else soft_weight
        else:
            raise ObjectiveError(
                "The loss takes beta, or hard_weight and soft_weight, not both.",
                why="beta is the weight of the labels, and 1 - beta that of the consensus.",
                hint=f"hard_weight={beta}, soft_weight={1 - beta} is the same as beta={beta}.",
            )
        self.temperature = temperature
        self.detach = switch("detach", detach)
        self.class_weights = switch("class_weights", class_weights)
        self.task.weigh_classes(class_weights)

    @property
    def beta(self) -> float | None:
        """Weight of the labels against the consensus; None where the two weights don't add up to 1."""
        return self.hard_weight if self.soft_weight == 1 - self.hard_weight else None

    @beta.setter
    def beta(self, beta: float) -> None:
        self.hard_weight = _BETA.checked(beta)
        self.soft_weight = 1 - beta

    @property
    def weights(self) -> tuple[float, float]:
        """Of the labels and of the consensus."""
        return self.hard_weight, self.soft_weight

    def soft_terms(self, heads: list[Tensor], target: Tensor | None) -> list[Tensor]:
        """Every head's cross entropy with the consensus of the others (equations 2 and 3), at every position."""
        teachers = consensus(as_teachers(heads, self.detach))
        return [self.task.distillation(t, z, self.temperature) for t, z in zip(teachers, heads, strict=True)]

    def forward(
        self,
        outputs: Sequence[object],
        target: Tensor | None,
        *args: Any,
        num_items: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As of every `Objective`; of hidden states and output layers a few rows at a time.

        Raises:
            ObjectiveError: as of every `Objective`; or there are hidden states, and an option needs all logits.
        """
        if not isinstance(self.logits, tuple):
            return super().forward(outputs, target, *args, num_items=num_items, **kwargs)
        states, *layer = (logits_of_heads(outputs, field) for field in self.logits)
        warn_of_shared(states)
        if not self._is_plain(len(states)) or self.reduction == "none" or target is None:
            raise ObjectiveError(
                "The loss can't be computed from hidden states.",
                why="That needs labels, the plain cross entropy, a constant consensus, and reduction mean or sum.",
                hint="Return logits from the model, and name their field.",
            )
        rows = states[0].shape[:-1]
        logits = states[0].new_empty(()).expand(rows.numel(), len(layer[0][0]))  # their shape alone
        if self.tokens:
            target = flat_labels(target, tuple(rows), self.tokens, ignored_label(self.hard))
        target = self.task.target(target, logits)
        weights = closed_form.Weights(*self.weights, self.temperature, self.reduction == "mean")
        layers = [(each[0], each[1] if len(each) > 1 else None) for each in zip(*layer, strict=True)]
        flat = [hidden.flatten(0, -2) for hidden in states]
        loss = hidden_states.loss(flat, layers, target, self.counted(target, logits), weights)
        return loss if num_items is None else loss * self._share(logits, target, num_items)

    def _is_plain(self, heads: int) -> bool:
        own = type(self) is CollaborativeLoss  # what a subclass changes, the closed form doesn't know
        return own and self.soft_weight > 0 and self.detach and heads > 1 and is_plain_cross_entropy(self.hard)

    def total(self, heads: list[Tensor], target: Tensor | None) -> Tensor:
        """The sum over heads (equation 4), in closed form where possible."""
        if not self._is_plain(len(heads)) or self.reduction == "none" or not isinstance(target, Tensor):
            return super().total(heads, target)
        if not closed_form.may_be_used(heads, target):
            return super().total(heads, target)
        target, by_operators = self.task.target(target, heads[0]), super().total
        weights = closed_form.Weights(*self.weights, self.temperature, self.reduction == "mean")
        return closed_form.loss(heads, target, self.counted(target, heads[0]), weights, by_operators)

    def options_shown(self) -> dict[str, object]:
        """With ``beta`` in place of the weights it stands for."""
        options = super().options_shown()
        if self.beta is None:
            return options
        left = {name: value for name, value in options.items() if not name.endswith("_weight")}
        return {"beta": self.beta, **left}


_BETA = options.Number(
    lambda value: 0 < value <= 1,
    must_be="in (0, 1]",
    why="It weighs the labels against the consensus (equation 3); without labels nothing is learnt.",
    hint="The paper uses 0.5; 1 trains on the labels alone.",
    name="beta",
)
