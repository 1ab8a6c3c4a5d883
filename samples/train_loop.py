"""Collaborative training in ten lines: four heads of a ResNet-20, one of which is kept.

python -m samples.train_loop
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fxcollab
from samples.networks.resnet_cifar import resnet20


def stripes(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy images of stripes, and the class of each: which of ten directions its stripes take."""
    target = torch.randint(10, (count,))
    angle = (target * math.pi / 10).view(-1, 1, 1)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = 2 * math.pi * torch.rand(count, 1, 1)
    wave = torch.sin(angle.cos() * x + angle.sin() * y + phase)
    return wave.unsqueeze(1) + 0.5 * torch.randn(count, 3, size, size), target


def main(steps: int = 20, weights: Path | None = None) -> tuple[list[float], nn.Module]:
    """Trains for some steps; returns their losses and the inference network.

    ``weights`` is where to save the weights of the inference network; they fit a plain ``resnet20()``.
    """
    torch.manual_seed(0)
    losses: list[float] = []

    train_model = fxcollab.transform(resnet20, pattern="hierarchical", splits=["stage1", "stage2"], seed=0)
    loss = fxcollab.CollaborativeLoss()
    optimizer = torch.optim.SGD(train_model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(steps):
        images, target = stripes(64)
        total = loss(train_model(images), target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    inference = fxcollab.prune(train_model, head=0)

    if weights is not None:
        save_file(inference.state_dict(), weights)
    return losses, inference


if __name__ == "__main__":
    for step, value in enumerate(main(weights=Path("resnet20.safetensors"))[0]):
        print(f"step {step:2d}  loss {value:.3f}")
