"""The plain CIFAR DenseNets of Huang et al., "Densely Connected Convolutional Networks" (2017), section 3.

A network of 3n+4 layers: one 3x3 convolution on 16 maps, three dense blocks of n layers with a transition
between two of them, and a classifier. No bottlenecks, no compression, no dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """BN-ReLU-3x3 convolution, whose ``growth`` maps are appended to the input's."""

    def __init__(self, maps: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(maps)
        self.conv = nn.Conv2d(maps, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class Transition(nn.Module):
    """BN-ReLU-1x1 convolution and a 2x2 average pool: as many maps, half the size."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(maps)
        self.conv = nn.Conv2d(maps, maps, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """Three dense blocks of ``layers`` layers (the n of 3n+4); a layer adds ``growth`` maps (the paper's k).

    Takes images of 4x4 pixels or more and gives ``num_classes`` logits.
    """

    def __init__(self, layers: int, growth: int, num_classes: int = 10) -> None:
        super().__init__()
        maps = [16 + block * layers * growth for block in range(4)]  # in front of, between and behind the blocks
        self.conv = nn.Conv2d(3, maps[0], 3, padding=1, bias=False)
        self.block1 = _block(maps[0], layers, growth)
        self.transition1 = Transition(maps[1])
        self.block2 = _block(maps[1], layers, growth)
        self.transition2 = Transition(maps[2])
        self.block3 = _block(maps[2], layers, growth)
        self.norm = nn.BatchNorm2d(maps[3])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(maps[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.conv(x))
        x = self.block2(self.transition1(x))
        x = self.block3(self.transition2(x))
        x = F.relu(self.norm(x))
        return self.fc(torch.flatten(self.pool(x), 1))


def densenet_cifar(depth: int, growth: int, num_classes: int = 10) -> DenseNet:
    """The plain CIFAR DenseNet of ``depth`` layers, where ``depth`` is 3n+4: 7, 10, 40, 100, ..."""
    layers, rest = divmod(depth - 4, 3)
    if layers < 1 or rest:
        raise ValueError(f"depth must be 3n+4 with n >= 1 (7, 10, ..., 40, ...), not {depth}")
    return DenseNet(layers, growth, num_classes)


def densenet40_12(num_classes: int = 10) -> DenseNet:
    """DenseNet-40 with growth 12: 1.0 M parameters."""
    return densenet_cifar(40, 12, num_classes)


def _block(maps: int, layers: int, growth: int) -> nn.Sequential:
    return nn.Sequential(*(DenseLayer(maps + layer * growth, growth) for layer in range(layers)))
