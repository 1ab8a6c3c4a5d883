"""Larger data sets, which torchvision reads from files and transforms."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

PARTS = {
    "ImageNet": ("train", "val"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "Places365": ("train-standard", "val"),
}
"""What torchvision calls the training and the test set, where it is not ``train`` and ``test``."""


@dataclass(frozen=True, eq=False)
class FromDisk:
    """Images that torchvision reads and transforms.

    Attributes:
        training: gives (image, label), transformed.
        testing: gives (image, label), transformed.
        classes: how many there are; None where torchvision doesn't say.
        workers: processes that read.
    """

    training: Dataset[Any]
    testing: Dataset[Any]
    classes: int | None
    workers: int = 4

    def steps(self, batch: int) -> int:
        """Batches an epoch; the rest, smaller than a batch, waits for another epoch."""
        return len(self.training) // batch  # type: ignore[arg-type]  # torchvision's have a length

    def train(self, epoch: int, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, in an order of its own."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        yield from DataLoader(
            self.training, batch, shuffle=True, drop_last=True, num_workers=self.workers, generator=generator
        )

    def test(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of the test set, in order."""
        yield from DataLoader(self.testing, batch, num_workers=self.workers)


def image_folder(folder: Path, size: int = 224) -> FromDisk:
    """Images in ``train/CLASS`` and ``val/CLASS`` (or ``test/CLASS``), as ImageNet's are.

    Raises:
        ValueError: a folder is missing, or the two don't hold the same classes.
    """
    testing = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if testing is None or not (folder / "train").is_dir():
        raise ValueError(f"{folder} has no train/CLASS and val/CLASS (or test/CLASS)")
    train = torchvision.datasets.ImageFolder(folder / "train", _training_transform(size))
    test = torchvision.datasets.ImageFolder(testing, _testing_transform(size))
    if train.classes != test.classes:
        differing = ", ".join(sorted({*train.classes} ^ {*test.classes}))
        raise ValueError(f"{folder / 'train'} and {testing} don't hold the same classes: {differing}")
    return FromDisk(train, test, len(train.classes))


def from_torchvision(name: str, folder: Path, size: int = 224) -> FromDisk:
    """A data set of torchvision's by its class name, such as ``Flowers102``, downloaded to ``folder``.

    Raises:
        ValueError: it has no parts to train and to test on.
    """
    kind = getattr(torchvision.datasets, name)
    options = inspect.signature(kind).parameters
    train_part, test_part = PARTS.get(name, ("train", "test"))
    if "split" in options and "train" not in options:
        which: tuple[dict[str, Any], dict[str, Any]] = {"split": train_part}, {"split": test_part}
    elif "train" in options and "split" not in options:
        which = {"train": True}, {"train": False}
    else:
        raise ValueError(_WITHOUT_PARTS.format(name))
    download = {"download": True} if "download" in options else {}
    transforms = _training_transform(size), _testing_transform(size)
    try:
        train, test = (
            kind(folder, transform=t, **part, **download) for part, t in zip(which, transforms, strict=True)
        )
    except (TypeError, ValueError) as error:  # parts of other names, or more that must be said
        raise ValueError(f"{_WITHOUT_PARTS.format(name)} ({error})") from error
    classes = getattr(train, "classes", None)
    return FromDisk(train, test, None if classes is None else len(classes))


_WITHOUT_PARTS = "{} has no parts named train and test; lay its images out in folders: --data folder"
_NORMALISE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TENSOR = (v2.RGB(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), _NORMALISE)


def _training_transform(size: int) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *_TENSOR])


def _testing_transform(size: int) -> v2.Compose:
    return v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), *_TENSOR])
