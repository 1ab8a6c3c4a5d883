"""Modules that a forward makes, and forwards that were replaced."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tracing.question_helpers import MORE, Net, X, agrees, line_at, made, proven, proven_or_refused, refused

# ---------------------------------------------------------------------------- modules made inside a forward


class MakesAModule(Net):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.make()(self.a(x)))
        return self.d(self.c(self.make()(h)))


@pytest.mark.parametrize(
    "make",
    [
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        pytest.param(lambda: nn.Softmax(dim=-1), marks=pytest.mark.slow),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Sequential(nn.Hardtanh(), nn.Flatten())),
        pytest.param(lambda: nn.LayerNorm(8, elementwise_affine=False), marks=pytest.mark.slow),
        lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
        pytest.param(lambda: nn.Dropout(0.5), marks=pytest.mark.slow),
    ],
    ids=["ReLU", "ReLU in place", "Softmax", "Sequential", "LayerNorm", "BatchNorm", "Dropout"],
)
def test_a_module_without_state_may_be_made_inside(make: Callable[[], nn.Module]) -> None:
    model = MakesAModule(make)
    train_model = proven(model)
    assert list(train_model.state_dict())[: len(model.state_dict())] == list(model.state_dict())
    if not isinstance(make(), nn.Dropout):
        assert agrees(train_model, model, MORE)


def test_pooling_may_be_made_inside() -> None:
    class Pools(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return self.tail(nn.MaxPool1d(2)(torch.cat([h, h * 2], 1)[:, None]).flatten(1))

    model = Pools()
    assert agrees(proven(model), model, MORE)


class HidesALayer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(8, 8)]

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.hidden[0](self.a(x)))  # hides


class MakesStatistics(Net):
    def forward(self, x: Tensor) -> Any:
        return self.tail(nn.BatchNorm1d(8)(self.a(x)))  # makes


class WrapsItsOwnLayers(Net):
    def forward(self, x: Tensor) -> Any:
        return self.d(nn.Sequential(self.b, nn.ReLU(), self.c)(self.a(x)))


@pytest.mark.parametrize("inputs", [(X,), pytest.param(None, marks=pytest.mark.slow)], ids=["given", "guessed"])
@pytest.mark.parametrize(
    ("make", "kind", "comment"),
    [
        (HidesALayer, "a Linear with state (weight)", "# hides"),
        (MakesStatistics, "a BatchNorm1d with state (", "# makes"),
    ],
)
def test_a_module_with_state_that_is_no_submodule_is_refused(
    make: type[Net], kind: str, comment: str, inputs: Any
) -> None:
    error = refused(lambda: made(make(), inputs, ["a"]))
    assert kind in str(error.why) and "is not a submodule: the forward creates or hides it" in str(error.why)
    assert line_at(error.where, __name__).endswith(comment)
    assert "module" in str(error.hint)


def test_a_module_around_the_models_own_layers_is_traced_into() -> None:
    proven(WrapsItsOwnLayers())


class DrawsItsWeights(Net):
    """Weights that are drawn at every call, and never trained."""

    def forward(self, x: Tensor) -> Any:
        return self.tail(nn.Linear(8, 8)(self.a(x)))


def test_weights_made_inside_are_drawn_at_every_call() -> None:
    train_model = proven(DrawsItsWeights())
    assert not torch.equal(train_model(X)[0], train_model(X)[0])


class MakesALayerOnce(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module | None = None

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        if self.layer is None:
            self.layer = nn.Linear(h.shape[1], 8)
        return self.tail(self.layer(h))


class MakesABlockOnce(Net):
    def __init__(self) -> None:
        super().__init__()
        self.made = nn.ModuleList()

    def forward(self, x: Tensor) -> Any:
        if not self.made:
            self.made.append(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        return self.tail(self.made[0](self.a(x)))


class MakesAParameterOnce(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weight: Any = None

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        if self.weight is None:
            self.weight = nn.Parameter(torch.randn(h.shape[1]))
        return self.tail(h * self.weight)


@pytest.mark.parametrize(
    ("make", "where"),
    [(MakesALayerOnce, "layer.weight"), (MakesABlockOnce, "made.0.0.weight"), (MakesAParameterOnce, "weight")],
)
def test_parameters_made_at_the_first_call_are_refused_before_it(make: type[Net], where: str) -> None:
    model = make()
    before = list(model.state_dict())
    error = refused(lambda: made(model, (X,), ["a"]))
    assert error.where == where and list(model.state_dict()) == before
    assert error.hint == "call the model once on an example, then transform it"
    model(X)
    proven(model)


# --------------------------------------------------------------------------------------- found on the way


def test_a_forward_that_was_replaced_on_the_root_is_the_one_captured() -> None:
    model = Net()
    model.forward = types.MethodType(lambda self, x: self.tail(self.a(x) * 2), model)  # type: ignore[method-assign]
    proven_or_refused(model)
