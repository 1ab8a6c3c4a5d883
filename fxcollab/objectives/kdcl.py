"""KDCL: one teacher made of all heads.

Guo et al., "Online Knowledge Distillation via Collaborative Learning", 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcollab.errors import ObjectiveError, closest
from fxcollab.objectives.consensus import require_peers
from fxcollab.objectives.objective import Objective, Options, learnt_from, require_temperature, require_weight
from fxcollab.objectives.outputs import described
from fxcollab.objectives.tasks import Classification, ignored_label

Ensemble: TypeAlias = Callable[[list[Tensor], Tensor], Tensor]
"""Makes the teacher's logits (N, C, ...) of those of all heads and the class indices (N, ...)."""


def naive(heads: list[Tensor], target: Tensor) -> Tensor:
    """At every position the logits of the head whose cross entropy with the label is lowest there."""
    losses = torch.stack([F.cross_entropy(z, target, reduction="none") for z in heads])
    best = losses.argmin(0).unsqueeze(0).unsqueeze(2)
    stacked = torch.stack(heads)
    return stacked.gather(0, best.expand(1, *stacked.shape[1:])).squeeze(0)


def min_logit(heads: list[Tensor], target: Tensor) -> Tensor:
    """Logits relative to the label's, of every class the least over all heads: the most that any gives the label."""
    relative = [z - z.gather(1, target.unsqueeze(1)) for z in heads]
    return torch.stack(relative).amin(0)


def mean(heads: list[Tensor], target: Tensor) -> Tensor:
    """The mean of all heads' logits, whatever the label."""
    return torch.stack(heads).mean(0)


ENSEMBLES: Mapping[str, Ensemble] = {"min-logit": min_logit, "naive": naive, "mean": mean}


class KDCLLoss(Objective):
    """The loss of KDCL: all heads learn from labels, and from one ensemble of them all.

    The total over the heads h of ``J_hard(y, z_h) + weight * T^2 * KL(p_t || p_h)``, p being the softmax at
    temperature T, and t the ensemble; where ``hard`` ignores the label, the mean of all heads. Its authors also show
    differently distorted images to the heads, which an objective can't do, and two ensembles that are solved for
    (linear, general): hand those in as callables.

    Args:
        ensemble: "min-logit", "naive" or "mean"; or a callable of the heads' logits and the class indices.
        temperature: T, finite and above 0.
        weight: of the divergence against the labels, at least 0.
        detach: whether the ensemble is a constant to the heads that learn from it.
        options: those of every `Objective`: hard, logits, reduction, finite. The task is classification, and targets
            are class indices.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is no loss of classes or reduces otherwise.
    """

    shown = ("ensemble", "temperature", "weight", "detach", *Objective.shown)

    def __init__(
        self,
        ensemble: str | Ensemble = "min-logit",
        temperature: float = 2.0,
        weight: float = 1.0,
        *,
        detach: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        require_temperature(temperature)
        require_weight(weight, "weight")
        _require_classification(self)
        self.ensemble = ensemble
        self.temperature = temperature
        self.weight = weight
        self.detach = detach
        self._ensemble = _ensemble(ensemble)

    def losses(self, heads: list[Tensor], target: Tensor) -> list[Tensor]:
        """The loss of every head."""
        require_peers(heads)
        hard = self.labelled(heads, target)
        target = _indices(self.task.target(target, heads[0]), heads[0])
        teacher = self._teacher(learnt_from(heads, self.detach), target)
        soft = self.task.divergences(teacher, heads, self.temperature)
        return [h + self.weight * s for h, s in zip(hard, soft, strict=True)]

    def _teacher(self, heads: list[Tensor], target: Tensor) -> Tensor:
        """The ensemble; where there is no label, the mean of all heads."""
        ignored = target.eq(ignored_label(self.hard))
        teacher = self._ensemble(heads, torch.where(ignored, 0, target))
        if not isinstance(teacher, Tensor) or teacher.shape != heads[0].shape:
            raise ObjectiveError(
                f"The ensemble gave {described(teacher)}.",
                why=f"It must give logits of shape {tuple(heads[0].shape)}, as each head does.",
                hint="An ensemble takes the heads' logits and the class indices.",
            )
        return torch.where(ignored.unsqueeze(1), mean(heads, target), teacher)


def _ensemble(ensemble: str | Ensemble) -> Ensemble:
    if callable(ensemble):
        return ensemble
    if ensemble not in ENSEMBLES:
        known = closest(ensemble, ENSEMBLES) or ", ".join(ENSEMBLES)
        raise ObjectiveError(f"There is no ensemble {ensemble!r}.", hint=f"Ensembles are {known}, or a callable.")
    return ENSEMBLES[ensemble]


def _require_classification(loss: Objective) -> None:
    if not isinstance(loss.task, Classification):
        raise ObjectiveError(
            f"KDCL is made for classification, not for {loss.task.name}.",
            why="Its ensembles go by the class of the label.",
            hint="CollaborativeLoss and MutualLoss know this task.",
        )


def _indices(target: object, z: Tensor) -> Tensor:
    if not isinstance(target, Tensor) or target.is_floating_point():
        raise ObjectiveError(
            "KDCL's ensembles take class indices, not soft labels.",
            where=f"the target is {described(target)}",
            hint="Hand in target.argmax(1), or use CollaborativeLoss.",
        )
    if target.shape != (z.shape[0], *z.shape[2:]):
        raise ObjectiveError(
            f"The target is {described(target)} and doesn't fit logits of shape {tuple(z.shape)}.",
            hint="KDCL's ensembles take one class index a position.",
        )
    return target.long()
