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
from fxcollab.objectives import options
from fxcollab.objectives.consensus import require_peers
from fxcollab.objectives.hard_loss import ignored_label
from fxcollab.objectives.objective import Options, as_teachers
from fxcollab.objectives.options import switch
from fxcollab.objectives.outputs import described
from fxcollab.objectives.tasks import Classification, positions
from fxcollab.objectives.two_terms import TwoTerms

Ensemble: TypeAlias = Callable[[list[Tensor], Tensor], Tensor]
"""The teacher's logits (N, C, ...), from those of all heads and the class indices (N, ...)."""


def naive(heads: list[Tensor], target: Tensor) -> Tensor:
    """At every position the logits of the head whose cross entropy with the label is lowest there."""
    losses = torch.stack([F.cross_entropy(z, target, reduction="none") for z in heads])
    best = losses.argmin(0).unsqueeze(0).unsqueeze(2)
    stacked = torch.stack(heads)
    return stacked.gather(0, best.expand(1, *stacked.shape[1:])).squeeze(0)


def min_logit(heads: list[Tensor], target: Tensor) -> Tensor:
    """For every class, the minimum over heads of its logit relative to the label's."""
    relative = [z - z.gather(1, target.unsqueeze(1)) for z in heads]
    return torch.stack(relative).amin(0)


def mean(heads: list[Tensor], target: Tensor) -> Tensor:
    """The mean of all heads' logits, whatever the label."""
    return torch.stack(heads).mean(0)


ENSEMBLES: Mapping[str, Ensemble] = {"min-logit": min_logit, "naive": naive, "mean": mean}


class KDCLLoss(TwoTerms):
    """The loss of KDCL: all heads learn from the labels, and from one ensemble of them all.

    The total over the heads h of ``J_hard(y, z_h) + weight * T^2 * KL(p_t || p_h)``, p being the softmax at
    temperature T, and t the ensemble; where heads learn on positions whose label ``hard`` ignores
    (``consensus_on="all"``), t is the mean of all heads. Its authors also
    show differently distorted images to the heads, which an objective can't do, and two ensembles that are solved for
    (linear, general): pass those as callables.

    Args:
        ensemble: "min-logit", "naive" or "mean"; or a callable of the heads' logits and the class indices.
        temperature: T, finite and above 0 (default 2).
        weight: of the divergence against the labels, at least 0 (default 1).
        detach: whether the ensemble is a constant to the heads that learn from it (default True).
        options: those of every `Objective`: hard, logits, tokens, consensus_on, reduction, finite. The task is
            classification, and targets are class indices.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is not a loss of classes or reduces otherwise.
    """

    weight = options.weight("the divergence from the ensemble", "the loss on the labels")

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
        if not isinstance(self.task, Classification):
            raise ObjectiveError(
                f"KDCL is made for classification, not for {self.task.name}.",
                why="Its ensembles depend on the class of the label.",
                hint="CollaborativeLoss and MutualLoss support this task.",
            )
        if not callable(ensemble) and (not isinstance(ensemble, str) or ensemble not in ENSEMBLES):
            known = closest(str(ensemble), ENSEMBLES) or ", ".join(ENSEMBLES)
            raise ObjectiveError(f"There is no ensemble {ensemble!r}.", hint=f"Ensembles are {known}, or a callable.")
        self.ensemble = ensemble
        self.temperature = temperature
        self.weight = weight
        self.detach = switch("detach", detach)

    @property
    def weights(self) -> tuple[float, float]:
        """Of the labels and of the divergence."""
        return 1.0, self.weight

    def soft_terms(self, heads: list[Tensor], target: Tensor | None) -> list[Tensor]:
        """Every head's divergence from the ensemble."""
        require_peers(heads)
        if target is not None:
            target = self.task.target(target, heads[0])
        shape = positions(heads[0])
        if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != shape:
            raise ObjectiveError(
                f"KDCL takes class indices of shape {shape}, the target is {described(target)}.",
                hint="Of soft labels pass target.argmax(1), or use CollaborativeLoss.",
            )
        teacher = self._teacher(as_teachers(heads, self.detach), target.long())
        return self.task.divergences(teacher, heads, self.temperature)

    def _teacher(self, heads: list[Tensor], target: Tensor) -> Tensor:
        """The ensemble; where the label is ignored, the mean of all heads."""
        ensemble = self.ensemble if callable(self.ensemble) else ENSEMBLES[self.ensemble]
        ignored = target.eq(ignored_label(self.hard))
        teacher = ensemble(heads, torch.where(ignored, 0, target))
        if not isinstance(teacher, Tensor) or teacher.shape != heads[0].shape:
            raise ObjectiveError(
                f"The ensemble gave {described(teacher)}.",
                why=f"It must give logits of shape {tuple(heads[0].shape)}, as each head does.",
                hint="An ensemble takes the heads' logits and the class indices.",
            )
        return torch.where(ignored.unsqueeze(1), mean(heads, target), teacher)
