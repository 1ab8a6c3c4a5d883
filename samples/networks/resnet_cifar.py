"""The CIFAR ResNets of He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2.

A network of 6n+2 layers: one 3x3 convolution, three stages of n basic blocks on 16, 32 and 64 maps, and a
classifier. The shortcuts have no parameters (the paper's option A).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shortcut(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the maps that the input lacks."""

    def __init__(self, in_maps: int, out_maps: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.missing = out_maps - in_maps

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_maps: int, out_maps: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_maps, out_maps, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_maps)
        self.conv2 = nn.Conv2d(out_maps, out_maps, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_maps)
        changes_shape = stride != 1 or in_maps != out_maps
        self.shortcut = Shortcut(in_maps, out_maps, stride) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks each (the n of 6n+2).

    Takes images of any size, of ``in_maps`` channels, and gives ``num_classes`` logits.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_maps: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_maps, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = _stage(16, 16, blocks, stride=1)
        self.stage2 = _stage(16, 32, blocks, stride=2)
        self.stage3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage1(x)
        x = self.stage2(x)
        x = self.stage3(x)
        return self.fc(torch.flatten(self.pool(x), 1))


def resnet_cifar(depth: int, num_classes: int = 10, in_maps: int = 3) -> ResNet:
    """The CIFAR ResNet of ``depth`` layers, where ``depth`` is 6n+2: 8, 14, 20, 32, 44, 56, 110, ..."""
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 6n+2 with n >= 1 (8, 14, 20, 32, ...), not {depth}")
    return ResNet(blocks, num_classes, in_maps)


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20: 0.27 M parameters."""
    return resnet_cifar(20, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    """ResNet-32: 0.46 M parameters."""
    return resnet_cifar(32, num_classes)


def resnet110(num_classes: int = 10) -> ResNet:
    """ResNet-110: 1.7 M parameters."""
    return resnet_cifar(110, num_classes)


def _stage(in_maps: int, out_maps: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_maps, out_maps, stride)
    return nn.Sequential(first, *(BasicBlock(out_maps, out_maps) for _ in range(blocks - 1)))
