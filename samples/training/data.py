"""Data sets: small ones held in memory, larger ones read by torchvision; both give batches by epoch and seed.

Whatever is random in an epoch (order, crops, wrong labels) depends on the seed and the epoch alone, so that a run
that was killed goes on to the same numbers.
"""

from __future__ import annotations

import gzip
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from samples.training.noise import with_noise

Batches: TypeAlias = Iterator[tuple[Tensor, Tensor]]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it


class DataSet(Protocol):
    """What the trainer asks of data."""

    @property
    def classes(self) -> int:
        """How many there are."""

    def steps(self, batch: int) -> int:
        """Batches an epoch."""

    def train(self, epoch: int, seed: int, batch: int) -> Batches:
        """Images (N, C, H, W), normalised and augmented, and class indices (N)."""

    def test(self, batch: int) -> Batches:
        """Images as they are, normalised."""


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
        noise: the share of labels that are wrong, drawn anew every epoch.
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

    def train(self, epoch: int, seed: int, batch: int) -> Batches:
        """Batches of one epoch, in an order of its own."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        labels = with_noise(self.labels, self.noise, self.classes, generator)
        order = torch.randperm(len(self.images), generator=generator)
        normalise = self._normaliser()
        for index in order.split(batch)[: self.steps(batch)]:
            yield normalise(self._augmented(self.images[index], generator)), labels[index]

    def test(self, batch: int) -> Batches:
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
        std = (shares @ values.square() - mean.square()).sqrt()
        return lambda images: (images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def _shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Every image by up to so many pixels each way, with zeros behind."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [pixels] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * pixels + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, down, right]


@dataclass(frozen=True, eq=False)
class FromDisk:
    """Images that torchvision reads and transforms.

    Attributes:
        training: gives (image, label), transformed.
        testing: gives (image, label), transformed.
        classes: how many there are.
        workers: processes that read.
    """

    training: Dataset[Any]
    testing: Dataset[Any]
    classes: int
    workers: int = 4

    def steps(self, batch: int) -> int:
        """Batches an epoch; the rest, smaller than a batch, waits for another epoch."""
        return len(self.training) // batch  # type: ignore[arg-type]  # torchvision's have a length

    def train(self, epoch: int, seed: int, batch: int) -> Batches:
        """Batches of one epoch, in an order of its own."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        yield from DataLoader(
            self.training, batch, shuffle=True, drop_last=True, num_workers=self.workers, generator=generator
        )

    def test(self, batch: int) -> Batches:
        """All of the test set, in order."""
        yield from DataLoader(self.testing, batch, num_workers=self.workers)


def fashion_mnist(folder: Path = FASHION_MNIST, count: int | None = None) -> InMemory:
    """Fashion-MNIST as its authors publish it: 60,000 and 10,000 grey images of 28 x 28, ten classes.

    Args:
        folder: with the four ``.gz`` files.
        count: how many of the training images, the first ones; None for all.
    """
    train, train_labels, test, test_labels = (
        _idx(folder / f"{part}-ubyte.gz")
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    return InMemory(
        train[:count].unsqueeze(1), train_labels[:count].long(), test.unsqueeze(1), test_labels.long(), 10, 2, True
    )


def digits(count: int | None = None) -> InMemory:
    """scikit-learn's digits: 1,797 grey images of 8 x 8, the last 300 for testing.

    Args:
        count: how many of the training images, the first ones; None for all.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images * 15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    return InMemory(images[:-300][:count], labels[:-300][:count], images[-300:], labels[-300:], 10, shift=1)


def cifar(classes: int, folder: Path) -> InMemory:
    """CIFAR-10 or CIFAR-100, downloaded to ``folder`` where they are not there; shifted by 4 and mirrored."""
    kind = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    train, test = (kind(folder, train=part, download=True) for part in (True, False))
    images, test_images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test))
    labels, test_labels = (torch.tensor(part.targets) for part in (train, test))
    return InMemory(images, labels, test_images, test_labels, classes, 4, True)


def image_folder(folder: Path, size: int = 224) -> FromDisk:
    """Images in ``train/CLASS`` and ``val/CLASS`` (or ``test/CLASS``), as ImageNet's are."""
    [testing] = [folder / name for name in ("val", "test") if (folder / name).is_dir()][:1] or [folder / "val"]
    train = torchvision.datasets.ImageFolder(folder / "train", _training_transform(size))
    test = torchvision.datasets.ImageFolder(testing, _testing_transform(size))
    return FromDisk(train, test, len(train.classes))


def torchvision_data(name: str, folder: Path, size: int = 224) -> FromDisk:
    """A data set of torchvision's by its class name, such as ``Flowers102``, downloaded to ``folder``."""
    kind = getattr(torchvision.datasets, name)
    options = inspect.signature(kind).parameters
    which = ({"train": True}, {"train": False}) if "train" in options else ({"split": "train"}, {"split": "test"})
    download = {"download": True} if "download" in options else {}
    train, test = (
        kind(folder, transform=transform, **part, **download)
        for part, transform in zip(which, (_training_transform(size), _testing_transform(size)), strict=True)
    )
    classes = len(train.classes) if hasattr(train, "classes") else 1 + max(int(label) for _, label in train)
    return FromDisk(train, test, classes)


def data_set(name: str, folder: Path, rgb: bool = False) -> DataSet:
    """A data set by the name that the command line takes.

    Args:
        name: "fashion-mnist", "digits", a class of torchvision.datasets, or "folder".
        folder: where its files are, or where they are downloaded to.
        rgb: whether grey images get three channels; those that are read from files have three.
    """
    found = _named(name, folder)
    if rgb and isinstance(found, InMemory):
        images, test_images = (part.expand(-1, 3, -1, -1) for part in (found.images, found.test_images))
        return replace(found, images=images, test_images=test_images)
    return found


def _named(name: str, folder: Path) -> DataSet:
    if name == "fashion-mnist":
        return fashion_mnist(folder if (folder / "train-images-idx3-ubyte.gz").exists() else FASHION_MNIST)
    if name == "digits":
        return digits()
    if name in ("CIFAR10", "CIFAR100"):
        return cifar(int(name.removeprefix("CIFAR")), folder)
    if name == "folder":
        return image_folder(folder)
    if not hasattr(torchvision.datasets, name):
        known = "fashion-mnist, digits, folder, or a class of torchvision.datasets"
        raise ValueError(f"no data set {name!r}: it is one of {known}")
    return torchvision_data(name, folder)


_NORMALISE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TENSOR = (v2.RGB(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), _NORMALISE)


def _training_transform(size: int) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *_TENSOR])


def _testing_transform(size: int) -> v2.Compose:
    return v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), *_TENSOR])


def _idx(file: Path) -> Tensor:
    """A file in MNIST's format: two zeros, type, dimensions, their sizes (big-endian), then bytes."""
    data = gzip.decompress(file.read_bytes())
    dimensions = data[3]
    shape = [int.from_bytes(data[4 + 4 * d : 8 + 4 * d], "big") for d in range(dimensions)]
    return torch.frombuffer(bytearray(data[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)
