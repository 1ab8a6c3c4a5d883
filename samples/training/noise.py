"""Wrong labels, as in section 4.1 of the paper."""

from __future__ import annotations

import torch
from torch import Tensor


def mislabelled(labels: Tensor, level: float, classes: int) -> Tensor:
    """Labels of which a share is wrong, and stays so; which, and what they are, is the same for all runs.

    Args:
        labels: class indices (N).
        level: the share that is wrong, from 0 to 1.
        classes: how many there are.
    """
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randperm(len(labels), generator=generator)[: round(level * len(labels))]
    steps = torch.randint(1, classes, (len(wrong),), generator=generator)
    return labels.index_copy(0, wrong, (labels[wrong] + steps) % classes)


def with_noise(labels: Tensor, level: float, classes: int, generator: torch.Generator) -> Tensor:
    """Labels of one epoch, of which a share is drawn from all classes alike.

    Which samples are corrupted is the same for all runs and epochs; what their labels are is drawn by ``generator``,
    anew every epoch. One in ``classes`` of those that are drawn is right by chance.

    Args:
        labels: class indices (N).
        level: the share that is corrupted, from 0 to 1.
        classes: how many there are.
        generator: of the epoch.
    """
    if not level:
        return labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    corrupted = order[: round(level * len(labels))]
    drawn = torch.randint(classes, (len(corrupted),), generator=generator)
    return labels.index_copy(0, corrupted, drawn)
