"""What is timed where: float32 on a CPU; on a GPU bfloat16 by autocast, channels last, and batches that fill it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def placed(model: nn.Module) -> nn.Module:
    """A model on the device, laid out for it."""
    return model.to(DEVICE, memory_format=torch.channels_last) if CUDA else model.to(DEVICE)


def batch(shape: tuple[int, ...], on_a_gpu: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels.

    Args:
        shape: of the images.
        on_a_gpu: how many there are on a GPU instead; None for as many.
    """
    count = on_a_gpu if CUDA and on_a_gpu else shape[0]
    images, labels = torch.rand(count, *shape[1:], device=DEVICE), torch.zeros(count, dtype=torch.long, device=DEVICE)
    return (images.to(memory_format=torch.channels_last) if CUDA else images), labels


def training_step(model: Callable[..., object], loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    """Forward, loss and backward."""
    if isinstance(model, nn.Module):
        model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        value = loss(model(x), y)
    value.backward()
