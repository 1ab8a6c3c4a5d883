"""The networks of the paper's CIFAR experiments."""

from samples.networks.densenet_cifar import DenseNet, densenet40_12, densenet_cifar
from samples.networks.resnet_cifar import ResNet, resnet20, resnet32, resnet110, resnet_cifar

__all__ = [
    "DenseNet",
    "ResNet",
    "densenet40_12",
    "densenet_cifar",
    "resnet20",
    "resnet32",
    "resnet110",
    "resnet_cifar",
]
