"""One step of training: over all heads at once, or over one after the other (table 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxcollab import Objective
from samples.training.recipe import Recipe

Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Takes images and labels, changes parameters, gives the loss."""
Loss: TypeAlias = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
"""Of the heads' outputs, labels and images."""


def outputs_of(model: nn.Module, images: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """What every head says; a plain network is one head."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.bfloat16):
        outputs = model(images)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def simultaneous(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Step:
    """All heads at once: the method's way, and the plain loop."""

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = loss(outputs_of(model, images, recipe), labels, images)
        total.backward()
        optimizer.step()
        return total.detach()

    return step


def alternating(
    model: nn.Module, loss: Objective, optimizers: Sequence[torch.optim.Optimizer], recipe: Recipe
) -> Step:
    """One head after the other, each after the others have moved: deep mutual learning's way.

    Args:
        model: a training model of independent instances, that share no parameters.
        loss: an objective that gives every head's part.
        optimizers: one a head, over its parameters.
        recipe: of the run.
    """

    def step(images: Tensor, labels: Tensor) -> Tensor:
        parts = []
        for head, optimizer in enumerate(optimizers):
            part = loss.per_head(outputs_of(model, images, recipe), labels)[head]
            optimizer.zero_grad()
            part.backward()
            optimizer.step()
            parts.append(part.detach())
        return torch.stack(parts).sum()

    return step
