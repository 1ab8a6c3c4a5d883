"""Levels that are hardly levels are told, whether splits are named or chosen."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcollab


def told(model: nn.Module, splits: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxcollab.transform(model, splits=splits, init="copy-anyway", **options)
    return [str(each.message).partition(":")[0] for each in caught]


def stack(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


LAST = ["only 0.8 % of the forward's operations lie behind '1'", "only 0.8 % of the parameters lie behind split '1'"]


@pytest.mark.parametrize(
    ("widths", "splits", "sentences"),
    [
        ((8, 8, 8, 8), ["0", "1"], []),
        ((64, 64, 64, 1), ["0", "1"], LAST),
        ((1, 64, 64, 64), ["0", "1"], ["only 0.8 % of the forward's operations lie before '0'"]),
        ((64, 64, 1, 64, 64), ["0", "2"], ["only 1.5 % of the forward's operations lie between '0' and '2'"]),
        ((64, 64, 64, 3), ["1"], ["only 2.3 % of the forward's operations lie behind '1'"]),
    ],
)  # fmt: skip
def test_levels_with_hardly_any_work_or_parameters_are_told(
    widths: tuple[int, ...], splits: list[str], sentences: list[str]
) -> None:
    assert told(stack(*widths), splits, example_inputs=(torch.randn(2, widths[0]),)) == sentences


def test_a_split_in_front_of_the_classifier_is_told_for_a_known_network() -> None:
    assert told(torchvision.models.resnet18(), ["layer4"]) == [
        "only 0.3 % of the forward's operations lie behind 'layer4'"
    ]
    assert told(torchvision.models.resnet18(), ["layer2", "layer3"]) == []
    assert told(torchvision.models.resnet18(), (), pattern="multi-instance") == []


def test_parameters_are_told_where_work_is_not_known() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.LayerNorm(512), nn.LayerNorm(8), nn.LayerNorm(2)

        def forward(self, x: Tensor) -> Any:
            return self.c(self.b(self.a(x)[..., :8])[..., :2])

    sentences = told(Norms(), ["a", "b"], example_inputs=(torch.randn(2, 512),))
    assert sentences == ["only 0.4 % of the parameters lie behind split 'b'"]


def test_a_choice_that_cannot_do_better_is_told() -> None:
    assert told(stack(256, 256, 256, 2), "auto", fanouts=(2, 2), example_inputs=(torch.randn(2, 256),)) == [
        "only 0.4 % of the forward's operations lie behind '1'", "only 0.4 % of the parameters lie behind split '1'",
    ]  # fmt: skip
