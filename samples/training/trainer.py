"""The loop over epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from samples.training import checkpoint
from samples.training.data import DataSet
from samples.training.recipe import Recipe
from samples.training.steps import Step


@dataclass(frozen=True)
class Training:
    """What is trained, and how a step is taken.

    Attributes:
        modules: all that has state: the model first, then what a loss learns.
        step: changes parameters.
        optimizers: with the state of the run.
    """

    modules: tuple[nn.Module, ...]
    step: Step
    optimizers: tuple[torch.optim.Optimizer, ...]


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave.

    Attributes:
        number: counted from 1.
        loss: the mean over its steps.
    """

    number: int
    loss: float


def epochs(
    training: Training,
    data: DataSet,
    recipe: Recipe,
    seed: int,
    *,
    device: torch.device | None = None,
    file: Path | None = None,
    each_step: Callable[[Tensor], None] = lambda loss: None,
) -> Iterator[Epoch]:
    """Train, epoch by epoch.

    All that is random in an epoch, dropout too, depends on the seed and its number alone: a run that was killed goes
    on from its last whole epoch, to the same numbers.

    Args:
        training: what to train.
        data: the data set.
        recipe: how long and how fast.
        seed: of the run.
        device: where the model is; None for the CPU.
        file: where the run is kept after every epoch, and from where it goes on; None for nowhere.
        each_step: is shown the loss of every step.
    """
    done = checkpoint.restore(file, training.modules, training.optimizers) if file else 0
    for epoch in range(done, recipe.epochs):
        torch.manual_seed(seed * 100_003 + epoch)
        for optimizer in training.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch)
        for module in training.modules:
            module.train()
        losses = []
        for images, labels in data.train(epoch, seed, recipe.batch):
            losses.append(training.step(images.to(device), labels.to(device)))
            each_step(losses[-1])
        if file:
            checkpoint.save(file, epoch + 1, training.modules, training.optimizers)
        yield Epoch(epoch + 1, torch.stack(losses).mean().item())
