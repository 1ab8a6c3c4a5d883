"""Distillation (Hinton et al., 2015) from a teacher, or from an ensemble of them: table 4's comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from fxcollab.errors import ObjectiveError
from fxcollab.objectives import options
from fxcollab.objectives.objective import Options
from fxcollab.objectives.two_terms import TwoTerms


class DistillationLoss(TwoTerms):
    """The loss of distillation: labels, and the mean logits of teachers that don't learn.

    The total over the heads h of ``beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q, z_h)``: equation 3 with the
    softmax of the teachers' mean logits in place of the consensus. Call it with ``(outputs, target, teachers)``:
    ``teachers`` is a tuple or list with one output per teacher, shaped like those of the heads. A single student is
    ``(output,)``.

    Args:
        beta: weight of the labels against the teachers, in [0, 1] (default 0.5). With 0 labels are left out, with 1
            teachers.
        temperature: T, finite and above 0 (default 2).
        options: those of every `Objective`: task, hard, logits, tokens, consensus_on, reduction, finite.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is not a loss of logits or reduces otherwise.

    Example:
        >>> with torch.no_grad():
        ...     teachings = [teacher(x) for teacher in teachers]
        >>> loss = DistillationLoss()((model(x),), target, teachings)
    """

    inputs = "a teacher, the target"

    beta = options.Number(
        lambda value: 0 <= value <= 1,
        must_be="in [0, 1]",
        why="It weighs the labels against the teachers (equation 3).",
        hint="0.5 is what the paper uses for the consensus; 0 learns from the teachers alone.",
    )

    def __init__(self, beta: float = 0.5, temperature: float = 2.0, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.beta = beta
        self.temperature = temperature

    @property
    def weights(self) -> tuple[float, float]:
        """Of the labels and of the teachers."""
        return self.beta, 1 - self.beta

    def soft_terms(self, heads: list[Tensor], target: Tensor | None, teachers: Sequence[object] = ()) -> list[Tensor]:
        """Every head's cross entropy with the softmax of the teachers' mean logits.

        Raises:
            ObjectiveError: there is no teacher, or one of another shape.
        """
        if not isinstance(teachers, tuple | list) or not teachers:
            raise ObjectiveError(
                "Distillation needs a tuple or list with one output per teacher.",
                hint="loss(outputs, target, [teacher(x) for teacher in teachers]), under torch.no_grad().",
            )
        mean = torch.stack(self.heads(teachers, "teacher")).mean(0).detach()
        if mean.shape != heads[0].shape:
            raise ObjectiveError(
                f"Teachers give {tuple(mean.shape)}, students {tuple(heads[0].shape)}.",
                hint="They must have the same batch and the same classes.",
            )
        return [self.task.distillation(mean, z, self.temperature) for z in heads]
