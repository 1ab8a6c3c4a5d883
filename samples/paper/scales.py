"""How large the experiments are: seconds, minutes to an hour on two cores, or as the paper ran them.

At the scale ``power`` they are small and many: networks that fit their data in seconds, 20 seeds (see ``power.py``).

The paper's supplement, which has its exact recipes, was not at hand. What stands at the scale ``paper`` instead: for
CIFAR the recipe that OKDDip and others use (SGD 0.1 with Nesterov momentum, batch 128, weight decay 5e-4, 300 epochs,
a tenth of the rate at 150 and 225), for ImageNet torchvision's for ResNet-50 (SGD 0.1, batch 256, weight decay 1e-4,
90 epochs, a tenth of the rate every 30).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from samples.training.data import DataSet
from samples.training.from_disk import image_folder
from samples.training.in_memory import InMemory, cifar, digits, fashion_mnist
from samples.training.noise import mislabelled
from samples.training.prepared import breast_cancer, fortunes
from samples.training.recipe import Recipe

Role: TypeAlias = Literal[
    "CIFAR-10",
    "CIFAR-100",
    "ImageNet",
    "claims",
    "updates",
    "scaling",
    "consensus",
    "objectives",
    "larger",
    "trees",
    "fixed",
]


@dataclass(frozen=True)
class Setting:
    """One data set, one network, one recipe.

    Attributes:
        data: a name of `DATA`.
        network: a name of `samples.paper.networks.NETWORKS`.
        recipe: the same for every method.
        seeds: how many runs, with seeds from 0.
        noise: levels of label noise; None for all that the experiment has.
        held_out: how many of the training samples are kept out of training, to choose the epoch to stop at. Where
            there are any, wrong labels are wrong from the first epoch to the last, those of the held-out samples too.
    """

    data: str
    network: str
    recipe: Recipe
    seeds: int
    noise: tuple[float, ...] | None = None
    held_out: int = 0


DATA: Mapping[str, Callable[[Path], DataSet]] = {
    "digits, 256": lambda folder: digits(256),
    "digits, 1,000": lambda folder: digits(1_000, shuffled=True),
    "breast cancer, 300": lambda folder: breast_cancer(),
    "fortunes, 2,000": lambda folder: fortunes(),
    "Fashion-MNIST, 1,000": lambda folder: fashion_mnist(count=1_000),
    "Fashion-MNIST": lambda folder: fashion_mnist(),
    "Fashion-MNIST, 1,000 halved": lambda folder: fashion_mnist(count=1_000, halved=True),
    "Fashion-MNIST, 2,000 halved": lambda folder: fashion_mnist(count=2_000, halved=True),
    "CIFAR-10": lambda folder: cifar(10, folder),
    "CIFAR-100": lambda folder: cifar(100, folder),
    "ImageNet": lambda folder: image_folder(folder / "imagenet"),
}

_CIFAR = Recipe(300)
_SMOKE = Setting("digits, 256", "ResNet-8, grey", Recipe(1, batch=64), 1)
# Few images and many epochs: like the networks of the paper after 300 epochs of CIFAR, this one fits its data.
_CPU = Setting("Fashion-MNIST, 1,000 halved", "ResNet-8, grey", Recipe(100, batch=32), 5)
# Table 1 again with twice the images and the layers, since the first setting can't tell its rows apart.
_CPU_LARGER = Setting("Fashion-MNIST, 2,000 halved", "ResNet-14, grey", Recipe(100, batch=32), 3)
_GPU = Setting("Fashion-MNIST", "ResNet-32, grey", Recipe(30, bfloat16=True), 3)
_DIGITS = Setting("digits, 1,000", "three convolutions", Recipe(40, batch=64), 20)
_CLOTHES = Setting(
    "Fashion-MNIST, 1,000 halved", "three convolutions", Recipe(40, batch=64), 20, noise=(0.0, 0.4, 0.6)
)
_CLOTHES_WHOLE = Setting("Fashion-MNIST, 1,000", "three convolutions", Recipe(40, batch=64), 20)
_TABLE = Setting("breast cancer, 300", "three layers", Recipe(40, batch=64), 20, noise=(0.0, 0.4))
_DIGITS_FIXED = replace(_DIGITS, held_out=200)
_TABLE_FIXED = replace(_TABLE, held_out=60)
_TEXT = Setting("fortunes, 2,000", "words", Recipe(20, batch=64, learning_rate=0.02), 20, noise=(0.0, 0.4))
SCALES: Mapping[str, Mapping[Role, tuple[Setting, ...]]] = {
    "smoke": {"CIFAR-10": (_SMOKE,), "CIFAR-100": (_SMOKE,), "ImageNet": (_SMOKE,)},
    "cpu": {"CIFAR-10": (_CPU, _CPU_LARGER), "CIFAR-100": (_CPU,), "ImageNet": (_CPU,)},
    "gpu": {"CIFAR-10": (_GPU,), "CIFAR-100": (_GPU,), "ImageNet": (_GPU,)},
    "power": {
        "claims": (_DIGITS, _TABLE, _CLOTHES, _TEXT),
        "updates": (_DIGITS,),
        "scaling": (_DIGITS,),
        "consensus": (_DIGITS,),
        "objectives": (_DIGITS,),
        "larger": (_CLOTHES_WHOLE,),
        "trees": (_DIGITS, _CLOTHES),
        "fixed": (_DIGITS_FIXED, _TABLE_FIXED),
    },
    "paper": {
        "CIFAR-10": (
            Setting("CIFAR-10", "ResNet-32", _CIFAR, 5),
            Setting("CIFAR-10", "ResNet-110", _CIFAR, 5),
            Setting("CIFAR-10", "DenseNet-40-12", replace(_CIFAR, batch=64), 3),
        ),
        "CIFAR-100": (Setting("CIFAR-100", "ResNet-32", _CIFAR, 5),),
        "ImageNet": (
            Setting(
                "ImageNet",
                "ResNet-50",
                Recipe(90, batch=256, weight_decay=1e-4, milestones=(1 / 3, 2 / 3), bfloat16=True),
                1,
            ),
        ),
    },
}


def data_of(setting: Setting, folder: Path, noise: float) -> tuple[DataSet, DataSet | None]:
    """A data set with so many wrong labels, and the same with its held-out samples in place of the test set.

    Args:
        setting: of the run.
        folder: where data sets are downloaded to, or expected.
        noise: the share of corrupted labels; sets that don't fit into memory have none.

    Raises:
        ValueError: the data set doesn't fit into memory, and some of its labels are to be wrong or held out.
    """
    data = DATA[setting.data](folder)
    if not noise and not setting.held_out:
        return data, None
    if not isinstance(data, InMemory):
        raise ValueError(f"label noise is for data sets held in memory, not for {setting.data}")
    if not setting.held_out:
        return replace(data, noise=noise), None
    labels, held = mislabelled(data.labels, noise, data.classes), setting.held_out
    trained = replace(data, images=data.images[:-held], labels=labels[:-held])
    return trained, replace(trained, test_images=data.images[-held:], test_labels=labels[-held:])
