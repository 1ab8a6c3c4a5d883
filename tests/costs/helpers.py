"""Small networks whose costs are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.costs.profile import profile
from fxcollab.tracing.interface import Interface


class Cifar(nn.Module):
    """Small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


STEM, LAYER1, LAYER2, FC = 3 * 4 * 9, 4 * 8 * 9 + 8 + 16, 8 * 8 * 9 + 8 + 16, 8 * 10 + 10


def conv_flops(batch: int, inputs: int, outputs: int, edge: int) -> int:
    """Two for every product of a 3x3 convolution."""
    return 2 * batch * inputs * outputs * 9 * edge * edge


def step_flops(batch: int, *layers: tuple[int, int, int]) -> int:
    """Of convolutions, forward and backward, where the first one's input needs no gradient."""
    forward = [conv_flops(batch, *layer) for layer in layers]
    return 3 * sum(forward) - forward[0]


def forward_flops(model: nn.Module, interface: Interface) -> int:
    """As the profile of its graph has them."""
    captured = fxcollab.capture(model, interface=interface).train(model.training)
    return sum(cost.forward_flops for cost in profile(captured, interface).nodes.values())


class Patches(nn.Module):
    """As a vision transformer: one image size only."""

    def __init__(self, size: int = 224) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 32, stride=32)
        self.position = nn.Parameter(torch.zeros(1, (size // 32) ** 2 + 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.pad(self.patch(x).flatten(2).transpose(1, 2), (0, 0, 1, 0)) + self.position
        return self.fc(self.block(tokens)[:, 0])


class Words(nn.Module):
    """An embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.embed(tokens).mean(1))


class Two(nn.Module):
    """Two inputs, one with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.c(self.a(x) * y * scale)


class ModeDependent(nn.Module):
    """An auxiliary head in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.aux = nn.Linear(4, 2)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return (self.c(x), self.aux(x)) if self.training else self.c(x)


class ValueDependent(nn.Module):
    """Can't run without real values."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.gate = Gate()
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.gate(self.a(x)))


class Gate(nn.Module):
    """Asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()
