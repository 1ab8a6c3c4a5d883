"""Errors on the test set: of every head, and of all together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxcollab.objectives.outputs import logits_of_heads
from samples.training.steps import outputs_of


@dataclass(frozen=True)
class Errors:
    """Shares of the test set that are classified wrongly.

    Attributes:
        heads: of every head, head 0 first: that is the one which is kept.
        ensemble: of the mean of all heads' logits.
        top5: of head 0, among the five likeliest classes.
        disagreement: the share of the test set for which another head says another class than head 0, a mean over
            the other heads; 0 of one head.
    """

    heads: tuple[float, ...]
    ensemble: float
    top5: float
    disagreement: float


@torch.no_grad()
def errors(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | None = None) -> Errors:
    """Run a training model, or a plain network, over a test set in eval mode.

    Args:
        model: gives logits (N, C), or a structure with a field of them; a training model a tuple of these.
        batches: images and class indices.
        device: where the model is; None for the CPU.
    """
    training = model.training
    model.eval()
    wrong, seen = torch.zeros(0), 0
    for images, labels in batches:
        heads = logits_of_heads(outputs_of(model, images.to(device)), "logits")
        target = labels.to(device)
        said = torch.stack([z.argmax(1) for z in [*heads, torch.stack(heads).mean(0)]])
        likeliest = heads[0].topk(min(5, heads[0].shape[1])).indices
        counts = [
            *(said != target).sum(1),
            (likeliest != target[:, None]).all(1).sum(),
            (said[1:-1] != said[0]).sum(),
        ]
        found = torch.stack(counts).cpu()
        wrong = wrong + found if seen else found
        seen += len(labels)
    model.train(training)
    *of_heads, ensemble, top5, differ = (wrong.double() / seen).tolist()
    return Errors(tuple(of_heads), ensemble, top5, differ / max(1, len(of_heads) - 1))
