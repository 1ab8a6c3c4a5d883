"""Errors on the test set: of every head, and of all together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Errors:
    """Shares of the test set that are classified wrongly.

    Attributes:
        heads: of every head, head 0 first: that is the one which is kept.
        ensemble: of the mean of all heads' logits.
        top5: of head 0, among the five likeliest classes; 0 where there are no more than five.
    """

    heads: tuple[float, ...]
    ensemble: float
    top5: float


@torch.no_grad()
def errors(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | None = None) -> Errors:
    """Run a training model, or a plain network, over a test set in eval mode.

    Args:
        model: gives one (N, C), or a tuple of them.
        batches: images and class indices.
        device: where the model is; None for the CPU.
    """
    training = model.training
    model.eval()
    wrong, seen = torch.zeros(0), 0
    for images, labels in batches:
        outputs = model(images.to(device))
        heads = [z.float() for z in outputs] if isinstance(outputs, tuple) else [outputs.float()]
        target = labels.to(device)
        everyone = [*heads, torch.stack(heads).mean(0)]
        counts = [(z.argmax(1) != target).sum() for z in everyone]
        counts.append((heads[0].topk(min(5, heads[0].shape[1])).indices != target[:, None]).all(1).sum())
        found = torch.stack(counts).cpu()
        wrong = found if not seen else wrong + found
        seen += len(labels)
    model.train(training)
    shares = (wrong.double() / seen).tolist()
    return Errors(tuple(shares[:-2]), shares[-2], shares[-1])
