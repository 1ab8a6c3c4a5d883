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


class TableNet(nn.Module):
    """Three linear layers with batch norm, and a classifier, for rows of a table.

    Args:
        num_classes: of the rows.
        columns: numbers in a row.
        width: of every layer.
    """

    def __init__(self, num_classes: int = 2, columns: int = 30, width: int = 64) -> None:
        super().__init__()
        self.stage1 = _layer(columns, width)
        self.stage2 = _layer(width, width)
        self.stage3 = _layer(width, width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (N, classes) of rows (N, columns)."""
        logits: Tensor = self.fc(self.stage3(self.stage2(self.stage1(rows))))
        return logits


class TextNet(nn.Module):
    """Vectors of words, two convolutions with batch norm along the text, and the largest value of each channel.

    Args:
        num_classes: of the texts.
        words: size of the vocabulary.
        width: numbers of a word's vector; the convolutions have twice and four times as many channels.
    """

    def __init__(self, num_classes: int = 10, words: int = 4_000, width: int = 16) -> None:
        super().__init__()
        self.stage1 = nn.Embedding(words, width)
        self.stage2 = _along(width, 2 * width)
        self.stage3 = _along(2 * width, 4 * width)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, texts: Tensor) -> Tensor:
        """Logits (N, classes) of texts (N, T), indices of words."""
        features: Tensor = self.stage3(self.stage2(self.stage1(texts).transpose(1, 2)))
        logits: Tensor = self.fc(features.amax(2))
        return logits


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


def _along(maps: int, more: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(maps, more, 3, padding=1, bias=False), nn.BatchNorm1d(more), nn.ReLU())


def _stage(maps: int, more: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(maps, more, 3, stride, 1, bias=False), nn.BatchNorm2d(more), nn.ReLU())
