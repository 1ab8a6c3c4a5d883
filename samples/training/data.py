"""What the trainer asks of data, and data sets by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torchvision
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from samples.training.from_disk import from_torchvision, image_folder
from samples.training.in_memory import FASHION_MNIST, InMemory, cifar, digits, fashion_mnist
from samples.training.noise import mislabelled


class DataSet(Protocol):
    """What the trainer asks of data."""

    @property
    def classes(self) -> int | None:
        """How many there are; None where nobody says."""

    def steps(self, batch: int) -> int:
        """Batches an epoch."""

    def train(self, epoch: int, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (N, C, H, W), normalised and augmented, and class indices (N); of epochs counted from 0."""

    def test(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as they are, normalised."""


def data_set(name: str, folder: Path, rgb: bool = False, size: int | None = None, noise: float = 0.0) -> DataSet:
    """A data set by the name that the command line takes.

    Args:
        name: "fashion-mnist", "digits", a class of torchvision.datasets, or "folder".
        folder: where its files are, or where they are downloaded to.
        rgb: whether grey images get three channels; those that are read from files have three.
        size: height and width; None for what images have, and 224 where they are read from files.
        noise: the share of the training labels that are wrong, and stay so.

    Raises:
        ValueError: there is no such data set, or it has no parts to train and to test on, or none to be made wrong.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"--noise is a share of the labels, from 0 to 1, not {noise}")
    found = _named(name, folder, size or 224)
    if not isinstance(found, InMemory):
        if noise:
            raise ValueError("--noise is for data that are held in memory: digits, fashion-mnist and CIFAR")
        return found
    parts = [found.images, found.test_images]
    if size:
        parts = [resize(part, [size, size], antialias=True) for part in parts]
    if rgb:
        parts = [part.expand(-1, 3, -1, -1) for part in parts]
    labels = mislabelled(found.labels, noise, found.classes)
    return replace(found, images=parts[0], test_images=parts[1], labels=labels)


def _named(name: str, folder: Path, size: int) -> DataSet:
    if name == "fashion-mnist":
        return fashion_mnist(folder if (folder / "train-images-idx3-ubyte.gz").exists() else FASHION_MNIST)
    if name == "digits":
        return digits()
    if name in ("CIFAR10", "CIFAR100"):
        return cifar(int(name.removeprefix("CIFAR")), folder)
    if name == "folder":
        return image_folder(folder, size)
    if name not in torchvision.datasets.__all__:
        known = "fashion-mnist, digits, folder, or a class of torchvision.datasets such as CIFAR10"
        raise ValueError(f"no data set {name!r}: it is one of {known}")
    return from_torchvision(name, folder, size)
