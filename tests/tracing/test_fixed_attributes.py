"""Numbers and texts in attributes that a traced forward reads: where they change, the graph says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import GuardError
from tests.rewriting.hazard_helpers import X, proven


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.power = nn.Linear(4, 4), 2

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) ** self.power


class Scheduled(nn.Module):
    """``calls`` it counts itself; ``epoch`` is of no account, and ``inner`` is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.inner, self.head = nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 3)
        self.noise, self.scale, self.rate, self.kind, self.extra = True, 1.0, 0.5, "relu", None
        self.calls = self.epoch = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.inner(self.block(self.stem(x)))
        x = x + 1 if self.noise else x
        x = nn.functional.dropout(x * self.scale, self.rate, self.training)
        x = getattr(torch, self.kind)(x)
        return self.head(x if self.extra is None else self.extra(x))


def set_to(name: str, value: Any) -> Callable[[nn.Module], None]:
    path, _, attribute = name.rpartition(".")
    return lambda model: setattr(model.get_submodule(path), attribute, value)


CHANGES = {
    name: set_to(name, value)
    for name, value in {
        "noise": False, "scale": 2.0, "rate": 0.1, "kind": "tanh", "extra": nn.Tanh(), "block.power": 3
    }.items()
}  # fmt: skip


def made() -> tuple[nn.Module, fxcollab.CollabGraphModule]:
    model = Scheduled()
    return model, fxcollab.transform(model, splits=["block.layer"], seed=0)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_a_change_of_what_was_read_is_said(name: str, training: bool) -> None:
    model, train_model = made()
    pruned = fxcollab.prune(train_model, 1)
    train_model.train(training)(X)
    CHANGES[name](model)
    with pytest.raises(GuardError, match=rf"captured where {name} is"):
        train_model(X)
    pruned(X)  # of its own
    CHANGES[name](pruned.root)
    with pytest.raises(GuardError, match=rf"captured where {name} is"):
        pruned(X)


def test_it_may_be_set_back_and_what_has_no_effect_may_change() -> None:
    model, train_model = made()
    for name, value in {"scale": 2.0, "epoch": 5, "calls": 7, "inner.power": 3}.items():
        set_to(name, value)(model)
    model.scale = 1.0
    train_model(X)


def test_copies_have_values_of_their_own() -> None:
    model, train_model = made()
    for copied in (copy.deepcopy(train_model), pickle.loads(pickle.dumps(train_model))):
        model.scale = 2.0
        copied(X)
        copied.root.scale = 3.0
        with pytest.raises(GuardError, match=r"scale is 1.0; here it is 3.0"):
            copied(X)
        model.scale = 1.0


@pytest.mark.parametrize("before", [{}, {"scale": float("1")}])
def test_what_is_set_on_the_training_model_is_not_read(before: dict[str, float]) -> None:
    model, train_model = made()
    vars(model).update(before)  # an equal number, but another object
    train_model.scale = 2.0
    with pytest.raises(GuardError, match=r"scale is 1.0; here it is 2.0"):
        train_model(X)


def test_compiled_code_notices_it_too() -> None:
    model = Scheduled()
    model.rate = 0.0
    train_model = proven(model, ["block.layer"])
    compiled = torch.compile(train_model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X)[0], train_model(X)[0])
    model.scale = 2.0
    with pytest.raises(Exception, match=r"scale is not what it was"):
        compiled(X)


OTHERS = {"shift": 1.0, "pair": (1.0, 3.0), "meta": 1, "_graph": 4, "scale": 2}


class Otherwise(Scheduled):
    """An attribute of the class, a pair, and names that a graph module has for itself."""

    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.meta, self._graph = (1.0, 2.0), None, 3

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.meta is None else x + 1
        return super().forward(x * self.pair[0] + self.shift + self._graph)


@pytest.mark.parametrize("name, value", OTHERS.items())
def test_attributes_of_classes_and_under_any_name_are_noticed(name: str, value: Any) -> None:
    model = Otherwise()
    model.rate = 0.0
    train_model = proven(model, ["block.layer"])
    model.scale = 1  # the same number
    train_model(X)
    setattr(model, name, value)
    with pytest.raises(GuardError, match=rf"captured where {name} is"):
        train_model(X)


class FollowsTheMode(Scheduled):
    def train(self, mode: bool = True) -> FollowsTheMode:
        super().train(mode)
        self.scale = 1.0 if mode else 2.0
        return self


def test_what_train_sets_has_a_value_in_each_mode() -> None:
    model = FollowsTheMode()
    train_model = fxcollab.transform(model, splits=["block.layer"], seed=0)
    for mode in (False, True, False):
        train_model.train(mode)(X)
    assert torch.equal(train_model(X), model.eval()(X))
    model.scale = 3.0
    with pytest.raises(GuardError, match=r"scale is 2.0; here it is 3.0"):
        train_model(X)


class Optional(Scheduled):
    def forward(self, x: Tensor, *, mask: Tensor | None = None, features: bool = False, limit: int = 3) -> Tensor:
        x = self.block(self.stem(x))
        x = x if mask is None else x * mask
        return x[:limit] if features else self.head(x)


@pytest.mark.parametrize("give", [{}, {"features": False, "mask": None}], ids=["left out", "given"])
def test_arguments_that_are_fixed_may_be_given_and_no_other_values(give: dict[str, Any]) -> None:
    model = Optional()
    train_model = fxcollab.transform(model, splits=["block.layer"], seed=0, example_inputs={"x": X, **give})
    for called in (train_model, fxcollab.prune(train_model), copy.deepcopy(train_model)):
        called(X, features=False, limit=3, mask=None)
        for name, value in {"features": True, "limit": 4, "mask": X}.items():
            with pytest.raises(GuardError, match=f"the argument {name} is"):
                called(X, **{name: value})


def test_a_nan_is_the_same_nan() -> None:
    model = Scheduled()
    model.scale = float("nan")
    fxcollab.transform(model, splits=["block.layer"], seed=0)(X)
