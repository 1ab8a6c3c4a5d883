"""Modules whose class has a ``__call__`` of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Doubled(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(2 * x)


class Again(Doubled):
    def __call__(self, x: Tensor, shift: float = 1.0) -> Any:
        return super().__call__(x) + shift


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 3

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


@pytest.mark.parametrize("granularity", ["auto", "op"])
@pytest.mark.parametrize("middle", [lambda: Doubled(4, 4), lambda: Again(4, 4), Pair])
@pytest.mark.parametrize("split", ["0", "1"])
def test_such_a_module_is_called_once_as_the_model_calls_it(middle: Any, split: str, granularity: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), middle(), nn.Linear(4, 2))
    before = type(model[1]).__call__
    train_model = fxcollab.transform(model, splits=[split], granularity=granularity, seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert type(model[1]).__call__ is before


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def __call__(self) -> Any:
        return super().__call__() * 2

    def forward(self) -> Tensor:
        return self.weight.exp()


class WithoutInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gives, self.b = nn.Linear(4, 4), Gives(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x) * self.gives())


def test_one_without_inputs_is_called_once_too() -> None:
    model = WithoutInputs()
    fxcollab.verify(model, fxcollab.transform(model, splits=["a"], seed=0), (X,)).raise_if_failed()


def test_a_split_inside_of_one_opens_its_call_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Pair(), nn.Linear(4, 2))
    train_model = fxcollab.transform(model, splits=["1.first"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_a_model_with_one_is_refused_and_can_be_put_into_another() -> None:
    model = Pair()
    with pytest.raises(fxcollab.CaptureError, match="Pair overrides __call__") as caught:
        fxcollab.transform(model, splits=["first"])
    assert caught.value.hint and "nn.Sequential(model)" in caught.value.hint
    around = nn.Sequential(model)
    fxcollab.verify(around, fxcollab.transform(around, splits=["0.first"], seed=0), (X,)).raise_if_failed()


def test_a_compiled_model_is_refused_with_the_right_order() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(fxcollab.CaptureError, match="is compiled") as caught:
        fxcollab.transform(torch.compile(model), splits=["0"])
    assert caught.value.hint and "give the model that was compiled" in caught.value.hint
