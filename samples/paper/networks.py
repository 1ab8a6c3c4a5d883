"""The networks of the experiments, and where the paper splits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torchvision
from torch import nn

from samples.networks.densenet_cifar import densenet40_12
from samples.networks.resnet_cifar import resnet_cifar
from samples.networks.small import ConvNet, TableNet, TextNet


@dataclass(frozen=True)
class Network:
    """A network that can be made for any number of classes.

    Attributes:
        make: takes ``num_classes``.
        splits: of each pattern (sections 4.1 and 4.2).
    """

    make: Callable[..., nn.Module]
    splits: Mapping[str, tuple[str, ...]]


def _after(simple: str, *hierarchical: str) -> Mapping[str, tuple[str, ...]]:
    return {"multi-instance": (), "simple": (simple,), "hierarchical": hierarchical}


_STAGES = _after("stage1", "stage1", "stage2")
NETWORKS: Mapping[str, Network] = {
    "three convolutions": Network(ConvNet, _STAGES),
    "three layers": Network(TableNet, _STAGES),
    "words": Network(TextNet, _STAGES),
    "ResNet-8, grey": Network(partial(resnet_cifar, 8, in_maps=1), _STAGES),
    "ResNet-14, grey": Network(partial(resnet_cifar, 14, in_maps=1), _STAGES),
    "ResNet-32, grey": Network(partial(resnet_cifar, 32, in_maps=1), _STAGES),
    "ResNet-32": Network(partial(resnet_cifar, 32), _STAGES),
    "ResNet-110": Network(partial(resnet_cifar, 110), _STAGES),
    "DenseNet-40-12": Network(densenet40_12, _after("block1", "block1", "block2")),
    "ResNet-50": Network(torchvision.models.resnet50, _after("layer2", "layer2", "layer3")),
}
