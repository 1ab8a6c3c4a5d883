"""How long and how fast to train: the same for one network and for many heads, as section 3.3 of the paper asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Plain SGD with steps in the learning rate, the usual recipe for CIFAR.

    Attributes:
        epochs: passes over the training set.
        batch: samples a step.
        learning_rate: at the start.
        momentum: of SGD, after Nesterov.
        weight_decay: of all parameters.
        milestones: where the learning rate is divided by ten, as shares of the epochs.
        bfloat16: whether networks run under autocast to bfloat16.
    """

    epochs: int
    batch: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.5, 0.75)
    bfloat16: bool = False

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.learning_rate * 0.1 ** sum(epoch >= share * self.epochs for share in self.milestones)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        """SGD over some parameters."""
        return torch.optim.SGD(
            parameters,
            self.learning_rate,
            self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )
