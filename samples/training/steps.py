"""One step of training: over all heads at once, or over one after the other (table 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

import fxcollab
from samples.training.recipe import Recipe

Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Takes images and labels, changes parameters, gives the loss."""
Loss: TypeAlias = Callable[[Sequence[object], Tensor, Tensor], Tensor]
"""Of the heads' outputs, labels and images."""


def outputs_of(model: nn.Module, images: Tensor, recipe: Recipe | None = None) -> Sequence[object]:
    """What every head says, under the recipe's autocast; a plain network is one head."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe is not None and recipe.bfloat16):
        if not isinstance(model, fxcollab.CollabGraphModule):
            return (model(images),)
        outputs = fxcollab.all_heads(model)(images)
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
    instances: Sequence[nn.Module],
    loss: fxcollab.Objective,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Recipe,
) -> Step:
    """One head after the other, each seeing what the ones before it say since they have moved: deep mutual learning.

    An instance speaks again once it has moved, all but the last: its BatchNorm statistics move twice a step.

    Args:
        instances: independent networks, one a head.
        loss: an objective that gives every head's part.
        optimizers: one a head, over its parameters.
        recipe: of the run.
    """

    def say(instance: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            said: Tensor = instance(images)
        return said

    def step(images: Tensor, labels: Tensor) -> Tensor:
        said = [say(instance, images) for instance in instances]
        parts = []
        for head, (instance, optimizer) in enumerate(zip(instances, optimizers, strict=True)):
            part = loss.per_head(said, labels)[head]
            optimizer.zero_grad()
            part.backward()
            optimizer.step()
            parts.append(part.detach())
            if instance is not instances[-1]:
                with torch.no_grad():
                    said[head] = say(instance, images)
        return torch.stack(parts).sum()

    return step
