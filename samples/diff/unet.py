"""A UNet whose skip connections cross two splits: ``fxcollab diff samples/diff/unet.py --splits down2,up2``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Down(nn.Module):
    """A convolution at one resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class Up(nn.Module):
    """A convolution of what comes from below, at twice the size, and of what was kept at this resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.cat([self.up(x), kept], 1)))


class UNet(nn.Module):
    """Two resolutions down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.pool1 = Down(3, 8), nn.MaxPool2d(2)
        self.down2, self.pool2 = Down(8, 16), nn.MaxPool2d(2)
        self.middle = Down(16, 32)
        self.up2, self.up1 = Up(48, 16), Up(24, 8)
        self.classes = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(self.pool1(fine))
        middle = self.middle(self.pool2(coarse))
        result: Tensor = self.classes(self.up1(self.up2(middle, coarse), fine))
        return result
