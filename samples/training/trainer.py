"""The loop over epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
        seconds: of training, from the first epoch to the end of this one, time before a kill included.
    """

    number: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Kept:
    """Where a run is kept after every epoch, and from where it goes on.

    Attributes:
        file: of the checkpoint.
        identity: what makes the run this one; a file of another run is refused.
    """

    file: Path
    identity: Mapping[str, Any]


def epochs(
    training: Training,
    data: DataSet,
    recipe: Recipe,
    seed: int,
    *,
    device: torch.device | None = None,
    kept: Kept | None = None,
    each_step: Callable[[Tensor], None] = lambda loss: None,
    before: Callable[[Epoch], None] = lambda epoch: None,
) -> Iterator[Epoch]:
    """Train, epoch by epoch.

    All that is random in an epoch, dropout too, depends on the seed and its number alone: a run that was killed goes
    on from its last whole epoch, to the same numbers. An epoch is whole once the caller asks for the next one: what
    the caller writes down of it is written down before the checkpoint is.

    Args:
        training: what to train.
        data: the data set.
        recipe: how long and how fast.
        seed: of the run.
        device: where the model is; None for the CPU.
        kept: where the run is kept; None for nowhere.
        each_step: is shown the loss of every step.
        before: is shown the epochs that were done before a kill.

    Raises:
        ValueError: the training set is smaller than a batch, or what is kept is of another run.
    """
    if not data.steps(recipe.batch):
        raise ValueError(f"a batch of {recipe.batch} is larger than the training set")
    history = []
    if kept:
        rows = checkpoint.restore(kept.file, kept.identity, training.modules, training.optimizers)
        history = [Epoch(**row) for row in rows]
    for done in history:
        before(done)
    for number in range(len(history), recipe.epochs):
        started, earlier = time.perf_counter(), history[-1].seconds if history else 0.0
        loss = _epoch(training, data, recipe, seed, number, device, each_step)
        history.append(Epoch(number + 1, loss, round(earlier + time.perf_counter() - started, 2)))
        yield history[-1]
        if kept:
            rows = [asdict(epoch) for epoch in history]
            checkpoint.save(kept.file, kept.identity, rows, training.modules, training.optimizers)


def _epoch(
    training: Training,
    data: DataSet,
    recipe: Recipe,
    seed: int,
    number: int,
    device: torch.device | None,
    each_step: Callable[[Tensor], None],
) -> float:
    """The mean loss of an epoch, counted from 0."""
    torch.manual_seed(seed * 100_003 + number)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(number)
    for module in training.modules:
        module.train()
    losses = []
    for images, labels in data.train(number, seed, recipe.batch):
        losses.append(training.step(images.to(device), labels.to(device)))
        each_step(losses[-1])
    return torch.stack(losses).mean().item()
