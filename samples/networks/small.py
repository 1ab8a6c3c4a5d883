"""Networks small enough for many runs on a CPU."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three convolutions with batch norm, the last two of them at half and a quarter of the size.

    Args:
        num_classes: of the images.
        in_maps: their channels.
        width: channels of the first stage; the next ones have twice as many each.
    """

    def __init__(self, num_classes: int = 10, in_maps: int = 1, width: int = 16) -> None:
        super().__init__()
        self.stage1 = _stage(in_maps, width, 1)
        self.stage2 = _stage(width, 2 * width, 2)
        self.stage3 = _stage(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W)."""
        features: Tensor = self.stage3(self.stage2(self.stage1(images)))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def _stage(maps: int, more: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(maps, more, 3, stride, 1, bias=False), nn.BatchNorm2d(more), nn.ReLU())
