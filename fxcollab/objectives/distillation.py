"""Distillation (Hinton et al., 2015) from a teacher, or from an ensemble of them: table 4's comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.objective import Objective, Options, require_temperature, total
from fxcollab.objectives.outputs import logits_of_heads


class DistillationLoss(Objective):
    """The loss of distillation: labels, and the mean logits of teachers that don't learn.

    The total over the heads h of ``beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q, z_h)``: equation 3 with the
    softmax of the teachers' mean logits in place of the consensus. A single student is ``(output,)``.

    Args:
        beta: weight of the labels against the teachers, in [0, 1]. With 0 labels are left out, with 1 teachers.
        temperature: T, finite and above 0.
        options: those of every `Objective`: task, hard, logits, reduction, finite.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is no loss or reduces otherwise.

    Example:
        >>> with torch.no_grad():
        ...     taught = [teacher(x) for teacher in teachers]
        >>> loss = DistillationLoss()((model(x),), target, taught)
    """

    shown = ("beta", "temperature", *Objective.shown)

    def __init__(self, beta: float = 0.5, temperature: float = 2.0, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        require_temperature(temperature)
        if not 0 <= beta <= 1:
            raise ObjectiveError(
                f"beta must be in [0, 1], not {beta}.",
                why="It weighs the labels against the teachers (equation 3).",
                hint="0.5 is what the paper uses for the consensus; 0 learns from the teachers alone.",
            )
        self.beta = beta
        self.temperature = temperature

    def forward(self, outputs: Sequence[object], target: Tensor, teachers: Sequence[object] = ()) -> Tensor:
        """The total loss.

        Args:
            outputs: as for `Objective.forward`.
            target: as for `Objective.forward`.
            teachers: the outputs of the ensemble's members, shaped like those of the heads.

        Returns:
            A scalar.

        Raises:
            ObjectiveError: as `Objective.forward`; or there is no teacher, or one of another shape.
        """
        heads = self.heads(outputs)
        return self.checked(total(self._losses(heads, target, teachers)), heads, "a teacher, the target")

    def per_head(self, outputs: Sequence[object], target: Tensor, teachers: Sequence[object] = ()) -> list[Tensor]:
        """The loss of every head."""
        return self._losses(self.heads(outputs), target, teachers)

    def losses(self, heads: list[Tensor], target: Tensor) -> list[Tensor]:
        """Not without teachers."""
        return self._losses(heads, target, ())

    def _losses(self, heads: list[Tensor], target: Tensor, teachers: Sequence[object]) -> list[Tensor]:
        if self.beta == 1:
            return self.labelled(heads, target)
        taught = self._taught(heads, teachers)
        soft = [(1 - self.beta) * self.task.soft(taught, z, self.temperature) for z in heads]
        if self.beta == 0:
            return soft
        return [self.beta * h + s for h, s in zip(self.labelled(heads, target), soft, strict=True)]

    def _taught(self, heads: list[Tensor], teachers: Sequence[object]) -> Tensor:
        if not isinstance(teachers, tuple | list) or not teachers:
            raise ObjectiveError(
                "Distillation takes a tuple or list with one output per teacher.",
                hint="loss(outputs, target, [teacher(x) for teacher in teachers]), under torch.no_grad().",
            )
        taught = torch.stack(logits_of_heads(teachers, self.logits, "teacher")).mean(0).detach()
        if taught.shape != heads[0].shape:
            raise ObjectiveError(
                f"Teachers give {tuple(taught.shape)}, students {tuple(heads[0].shape)}.",
                hint="They must see the same batch and know the same classes.",
            )
        return taught
