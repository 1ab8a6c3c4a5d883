"""What the scripts here train on, real and tiny: scikit-learn's digits, and a network for them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samples.training.in_memory import digits


def training_set() -> TensorDataset:
    """1,497 images (1, 8, 8), of mean 0 and deviation 1, and their classes."""
    [(images, labels)] = digits().train(epoch=0, seed=0, batch=1_497)
    return TensorDataset(images, labels)


def test_set() -> tuple[Tensor, Tensor]:
    """300 images (300, 1, 8, 8) and their classes."""
    [batch] = digits().test(300)
    return batch


class DigitNet(nn.Module):
    """Three convolutional stages with group norms, which don't mind how a batch is divided over processes."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = _stage(1, 16, 1)
        self.stage2 = _stage(16, 32, 2)
        self.stage3 = _stage(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stage3(self.stage2(self.stage1(images)))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def _stage(channels: int, more: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, more, 3, stride, 1), nn.GroupNorm(4, more), nn.ReLU())


def error(network: nn.Module) -> float:
    """The share of the test images that a network (of one head) gets wrong."""
    images, labels = test_set()
    network.eval()
    images = images.to(next(network.parameters()).dtype)
    return float((network(images).argmax(1) != labels).float().mean())
