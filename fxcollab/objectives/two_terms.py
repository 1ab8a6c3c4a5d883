"""Objectives of two terms: the loss on the labels, and a soft one towards a teacher (equation 3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fxcollab.objectives import options
from fxcollab.objectives.objective import Objective
from fxcollab.objectives.outputs import widened


class Parts(NamedTuple):
    """The two terms of every head before they are weighted; the soft one includes its factor T^2."""

    hard: list[Tensor]
    soft: list[Tensor]


class TwoTerms(Objective):
    """Every head's loss is ``hard weight * J_hard + soft weight * T^2 * J_soft``.

    A subclass implements `weights` and `soft_terms`. The temperature T can be set during training.
    """

    temperature = options.temperature()

    @property
    @abstractmethod
    def weights(self) -> tuple[float, float]:
        """Of the hard and of the soft term."""

    @abstractmethod
    def soft_terms(self, heads: list[Tensor], target: Tensor | None, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Every head's J_soft times T^2, one value for every position."""

    def parts(self, outputs: Sequence[object], target: Tensor | None, *args: Any, **kwargs: Any) -> Parts:
        """Both terms of every head, for logging and for weights of your own.

        Args:
            outputs: as for `forward`.
            target: as for `forward`.
            *args: as for `forward`.
            **kwargs: as for `forward`.

        Returns:
            ``.hard`` and ``.soft``, each with one entry per head, of the shape that the loss has.

        Raises:
            ObjectiveError: as for `per_head`.
        """
        heads, target, shape = self.read(outputs, target)
        heads = widened(heads)
        hard = self.hard_losses(heads, target)
        soft = self.reduced(self.soft_terms(heads, target, *args, **kwargs), self.counted(target, heads[0]))
        return Parts([self.shaped(h, shape) for h in hard], [self.shaped(s, shape) for s in soft])

    def losses(self, heads: list[Tensor], target: Tensor | None, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The loss of every head; a term whose weight is 0 is left out."""
        hard_weight, soft_weight = self.weights
        if soft_weight == 0:
            return [hard_weight * h for h in self.hard_losses(heads, target)]
        return self.weighted(heads, target, self.soft_terms(heads, target, *args, **kwargs))

    def weighted(self, heads: list[Tensor], target: Tensor | None, soft_terms: list[Tensor]) -> list[Tensor]:
        """The loss of every head from its soft terms."""
        hard_weight, soft_weight = self.weights
        soft = [soft_weight * s for s in self.reduced(soft_terms, self.counted(target, heads[0]))]
        if hard_weight == 0:
            return soft
        return [hard_weight * h + s for h, s in zip(self.hard_losses(heads, target), soft, strict=True)]
