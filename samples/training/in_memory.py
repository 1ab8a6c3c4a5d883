"""Small data sets, held in memory.

Whatever is random in an epoch (order, crops, wrong labels) depends on the seed and the epoch alone, so that a run
that was killed goes on to the same numbers.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from samples.training.noise import with_noise

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it


@dataclass(frozen=True, eq=False)
class InMemory:
    """A small data set.

    Attributes:
        images: for training, uint8 (N, C, H, W).
        labels: for training, int64 (N).
        test_images: for testing.
        test_labels: for testing.
        classes: how many there are.
        shift: by how many pixels images are shifted at random.
        flip: whether they are mirrored at random.
        noise: the share of labels that are corrupted, drawn anew every epoch.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    shift: int = 0
    flip: bool = False
    noise: float = 0.0

    def steps(self, batch: int) -> int:
        """Batches an epoch; the rest, smaller than a batch, waits for another epoch."""
        return len(self.images) // batch

    def train(self, epoch: int, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, in an order of its own."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        labels = with_noise(self.labels, self.noise, self.classes, generator)
        order = torch.randperm(len(self.images), generator=generator)
        normalise = self._normaliser()
        for index in order.split(batch)[: self.steps(batch)]:
            yield normalise(self._augmented(self.images[index], generator)), labels[index]

    def test(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of the test set, in order."""
        normalise = self._normaliser()
        for images, labels in zip(self.test_images.split(batch), self.test_labels.split(batch), strict=True):
            yield normalise(images), labels

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.shift:
            images = _shifted(images, self.shift, generator)
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        return images

    def _normaliser(self) -> Callable[[Tensor], Tensor]:
        """By mean and deviation of every channel of the training set."""
        values = torch.arange(256.0)
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in self.images.unbind(1)])
        shares = counts / counts.sum(1, keepdim=True)
        mean = shares @ values
        std = (shares @ values.square() - mean.square()).clamp(min=1e-6).sqrt()
        return lambda images: (images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def _shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Every image by up to so many pixels each way, with zeros behind."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [pixels] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * pixels + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, down, right]


def fashion_mnist(folder: Path = FASHION_MNIST, count: int | None = None, halved: bool = False) -> InMemory:
    """Fashion-MNIST as its authors publish it: 60,000 and 10,000 grey images of 28 x 28, ten classes.

    Args:
        folder: with the four ``.gz`` files.
        count: how many of the training images, the first ones; None for all.
        halved: to 14 x 14, by the mean of four pixels.
    """
    train, train_labels, test, test_labels = (
        _idx(folder / f"{part}-ubyte.gz")
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    train, test = (images.unsqueeze(1) for images in (train[:count], test))
    if halved:
        train, test = (_halved(images) for images in (train, test))
    return InMemory(train, train_labels[:count].long(), test, test_labels.long(), 10, 1 if halved else 2, True)


def digits(count: int | None = None, shuffled: bool = False) -> InMemory:
    """scikit-learn's digits: 1,797 grey images of 8 x 8, the last 300 for testing, by writers of their own.

    Args:
        count: how many of the training images, the first ones; None for all.
        shuffled: whether to draw ``count`` images for training, the same ones always, and test on all others; these
            are not shifted.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images * 15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    if shuffled:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        return InMemory(images[:count], labels[:count], images[count:], labels[count:], 10)
    return InMemory(images[:-300][:count], labels[:-300][:count], images[-300:], labels[-300:], 10, shift=1)


def cifar(classes: int, folder: Path) -> InMemory:
    """CIFAR-10 or CIFAR-100, downloaded to ``folder`` where they are not there; shifted by 4 and mirrored."""
    kind = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    train, test = (kind(folder, train=part, download=True) for part in (True, False))
    images, test_images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test))
    labels, test_labels = (torch.tensor(part.targets) for part in (train, test))
    return InMemory(images, labels, test_images, test_labels, classes, 4, True)


def _halved(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def _idx(file: Path) -> Tensor:
    """A file in MNIST's format: two zeros, type, dimensions, their sizes (big-endian), then bytes."""
    data = gzip.decompress(file.read_bytes())
    dimensions = data[3]
    shape = [int.from_bytes(data[4 + 4 * d : 8 + 4 * d], "big") for d in range(dimensions)]
    return torch.frombuffer(bytearray(data[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)
