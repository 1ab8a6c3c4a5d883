"""State that modules reach without registering it."""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from fxcollab import SplitError
from tests.speeds import slow_but
from tests.untouched import Untouched


class Holder(nn.Module):
    """Kept whole; its forward may use what it holds, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


class Holding(nn.Module):
    """``holder`` holds what it is given; ``spare`` is never used, and ``pair`` is opened where it holds a split."""

    def __init__(self, hold: Callable[[Any], Any] = lambda model: None) -> None:
        super().__init__()
        self.a, self.holder = nn.Linear(4, 4), Holder()
        self.pair, self.spare = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.holder.__dict__["held"] = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.holder(self.a(x * self.table)))


class Slot:
    def __init__(self, value: Any) -> None:
        self.value = value

    def call(self, x: Tensor) -> Tensor:
        return self.value(x)


def default_of(weight: Tensor) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor = weight) -> Tensor:
        return F.linear(x, weight)

    return function


def only_by_keyword(weight: Tensor) -> Callable[..., Tensor]:
    def function(x: Tensor, *, weight: Tensor = weight) -> Tensor:
        return F.linear(x, weight)

    return function


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def proven(model: nn.Module, *splits: str, pattern: Any = "hierarchical") -> fxcollab.CollabGraphModule:
    """The training model, which is accepted and passes the whole proof; no branch holds a parameter of another."""
    train_model = fxcollab.transform(model, pattern, splits, init="copy-anyway", seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    names = [name for name, _ in train_model.named_parameters(remove_duplicate=False) if name.startswith("peers.b1.")]
    assert names
    for name in names:
        assert train_model.get_parameter(name) is not model.get_parameter(name.removeprefix("peers.b1.")), name
    return train_model


def unregistered(model: nn.Module, *splits: str) -> SplitError:
    """The refusal, after which the model is as it was."""
    before = Untouched(model)
    with pytest.raises(SplitError, match="without registering it") as caught:
        fxcollab.transform(model, splits=splits, init="copy-anyway")
    assert before.differences() == []
    return caught.value


@pytest.mark.parametrize(
    ("hold", "where"),
    [
        (lambda model: model.a.weight, ""),
        pytest.param(lambda model: (model.a.weight,), "[0]", marks=pytest.mark.slow),
        (lambda model: [1, [model.a.weight]], "[1][0]"),
        pytest.param(lambda model: {"key": model.a.weight}, "['key']", marks=pytest.mark.slow),
        (lambda model: {model.a.weight: 1}, " (key 0)"),
        pytest.param(lambda model: {model.a.weight}, "[0]", marks=pytest.mark.slow),
        pytest.param(lambda model: deque([model.a.weight]), "[0]", marks=pytest.mark.slow),
        (lambda model: Slot([model.a.weight]), ".value[0]"),
        (lambda model: partial(F.linear, weight=model.a.weight), ".keywords['weight']"),
        pytest.param(lambda model: partial(F.linear, model.a.weight), ".args[0]", marks=pytest.mark.slow),
        (lambda model: (lambda weight: lambda x: F.linear(x, weight))(model.a.weight), " (variable weight)"),
        pytest.param(lambda model: default_of(model.a.weight), ".__defaults__[0]", marks=pytest.mark.slow),
        (lambda model: only_by_keyword(model.a.weight), ".__kwdefaults__['weight']"),
        (lambda model: model.a.weight.add, ".__self__"),
        (lambda model: weakref.ref(model.a.weight), "()"),
        pytest.param(lambda model: nn.ParameterList([model.a.weight]), "", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_parameter_of_the_trunk_that_a_head_reaches_unregistered_is_refused(hold: Any, where: str) -> None:
    error = unregistered(Holding(hold), "a")
    assert error.what == "'holder' reaches 'a.weight' without registering it."
    assert error.where == f"holder.held{where}"
    assert error.why == "the branches would share 'a.weight', and its gradient could not be rescaled to their mean"
    assert "on 'holder' itself, as in self.w = w" in str(error.hint)
    assert "or put the splits behind both" in str(error.hint)


@pytest.mark.parametrize(
    ("hold", "where"),
    [
        (lambda model: model.a, ""),
        pytest.param(lambda model: [model.a], "[0]", marks=pytest.mark.slow),
        pytest.param(lambda model: partial(model.a), ".func", marks=pytest.mark.slow),
        (lambda model: model.a.forward, ".__self__"),
        (lambda model: Slot(model.a).call, ".__self__.value"),
        (lambda model: (lambda a: lambda x: a(x))(model.a), " (variable a)"),
        pytest.param(lambda model: weakref.ref(model.a), "()", marks=pytest.mark.slow),
    ],
)
def test_a_module_of_the_trunk_that_a_head_reaches_unregistered_is_refused(hold: Any, where: str) -> None:
    error = unregistered(Holding(hold), "a")
    assert error.what == "'holder' reaches 'a' without registering it."
    assert error.where == f"holder.held{where}"
    assert "share 'a.weight'" in str(error.why)


def test_what_a_module_inside_a_kept_one_holds_is_named_by_its_path() -> None:
    model = Holding()
    model.holder.inner.held = [model.a.bias]
    error = unregistered(model, "a")
    assert error.what == "'holder.inner' reaches 'a.bias' without registering it."
    assert error.where == "holder.inner.held[0]"


def test_frozen_parameters_count_they_may_be_thawed() -> None:
    model = Holding(lambda model: (model.a.weight,))
    model.a.requires_grad_(False)
    unregistered(model, "a")


def test_registered_state_that_only_a_head_reaches_is_refused_where_it_doesnt_register_it() -> None:
    assert "'spare.weight'" in str(unregistered(Holding(lambda model: [model.spare]), "a").why)


@pytest.mark.parametrize("split", ["a", "pair.0"])
def test_a_reference_to_the_model_around_is_refused(split: str) -> None:
    error = unregistered(Holding(lambda model: [model]), split)
    assert error.what == "'holder' reaches the model around it without registering it."
    assert "behind both" not in str(error.hint)


def test_a_trunk_that_reaches_a_heads_own_is_refused() -> None:
    error = unregistered(Holding(lambda model: [model.pair]), "holder")
    assert error.what == "'holder' reaches 'pair' without registering it."
    assert error.why == "each branch behind has a 'pair.0.weight' of its own, of which it would reach head 0's"


def test_a_branch_that_reaches_what_lies_behind_the_next_split_is_refused() -> None:
    error = unregistered(Holding(lambda model: [model.pair]), "a", "holder")
    assert error.why == "each branch behind has a 'pair.0.weight' of its own, of which it would reach head 0's"


def test_a_module_that_is_opened_isnt_copied_with_what_refers_to_it() -> None:
    error = unregistered(Holding(lambda model: [model.pair]), "a", "pair.0")
    assert error.what == "'holder' reaches 'pair' without registering it."


def in_a_function(model: nn.Module) -> None:
    model.holder.forward = lambda x: model.holder.norm(model.holder.inner(x))


def in_the_forward_it_had(model: nn.Module) -> None:
    model.holder.forward = torch.no_grad()(model.holder.forward)


def in_a_method(model: nn.Module) -> None:
    forward = model.holder.forward
    model.holder.forward = types.MethodType(lambda self, x: forward(x) * 2, model.holder)


def in_a_global(model: nn.Module) -> None:
    scope: dict[str, Any] = {"model": model}
    exec("model.holder.forward = lambda x: [model.holder(x) for _ in range(1)][0]", scope)


def in_a_class(model: nn.Module) -> None:
    class Closes(Holder):
        def forward(self, x: Tensor) -> Tensor:
            return model.holder.norm(self.inner(x))

    model.holder.__class__ = Closes


@pytest.mark.parametrize(
    "patch",
    slow_but(
        [in_a_function, in_a_global, in_a_class],
        [in_a_function, in_the_forward_it_had, in_a_method, in_a_global, in_a_class],
    ),
)
def test_a_function_that_reaches_the_very_module_is_refused_since_it_isnt_copied(patch: Any) -> None:
    model = Holding()
    patch(model)
    error = unregistered(model, "a")
    assert error.what.startswith("'holder' reaches ")
    assert str(error.where).startswith("holder.forward")
    assert "types.MethodType(function, module)" in str(error.hint)


def test_a_function_that_reaches_a_heads_own_parameter_would_take_head_0s_in_every_branch() -> None:
    model = Holding(lambda model: (lambda weight: lambda x: F.linear(x, weight))(model.holder.inner.weight))
    error = unregistered(model, "a")
    assert error.why == (
        "functions, weak references and opened modules aren't copied: "
        "every head would use head 0's 'holder.inner.weight'"
    )


def test_a_buffer_of_a_branch_reached_through_a_function_is_refused() -> None:
    unregistered(Holding(lambda model: (lambda mean: lambda x: x - mean)(model.holder.norm.running_mean)), "a")


class Both(nn.Module):
    """Calls ``cell`` in front of ``mix`` and behind."""

    def __init__(self, hold: Callable[[Any], Any]) -> None:
        super().__init__()
        self.cell, self.mix, self.last = Holder(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.cell.__dict__["held"] = hold(self.cell)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(self.mix(self.cell(x))))


def test_a_module_called_on_both_sides_is_refused_where_it_holds_its_own_weight_unregistered() -> None:
    error = unregistered(Both(lambda cell: [cell.inner.weight]), "mix")
    assert error.what == "'cell' reaches 'cell.inner.weight' without registering it."
    assert "could not be rescaled" in str(error.why)
    with pytest.warns(UserWarning, match="^limitation: buffers cell.norm.num_batches_tracked"):
        train_model = fxcollab.transform(Both(lambda cell: [cell.inner]), splits=["mix"], init="copy-anyway")
    assert "peers.b1.cell.inner.weight" not in train_model.state_dict()  # the trunk uses it, so that all branches do


def test_independent_instances_may_not_reach_one_another() -> None:
    model = Holding(lambda model: (lambda a: lambda x: a(x))(model.a))
    with pytest.raises(SplitError, match="'holder' reaches 'a' without registering it") as caught:
        fxcollab.transform(model, "multi-instance", init="copy-anyway")
    assert "splits" not in str(caught.value.hint)
    proven(Holding(lambda model: [model.a]), pattern="multi-instance")


def ringed(model: nn.Module) -> list[Any]:
    ring: list[Any] = [model.holder.inner]
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(lambda model: None, marks=pytest.mark.slow),
        lambda model: [model.holder.inner, {"key": (model.holder.norm,)}],
        lambda model: (model.holder.inner.weight, model.holder.norm.running_mean),
        pytest.param(lambda model: [model.holder], marks=pytest.mark.slow),
        lambda model: model.holder.forward,
        pytest.param(lambda model: partial(model.holder.inner, 1), marks=pytest.mark.slow),
        pytest.param(lambda model: Slot(model.holder.inner).call, marks=pytest.mark.slow),
        lambda model: [model.pair, model.pair[0].weight],
        pytest.param(lambda model: nn.Linear(4, 4), marks=pytest.mark.slow),
        lambda model: [model.table, Slot(model.table)],
        lambda model: (lambda table: lambda x: x * table)(model.table),
        pytest.param(
            lambda model: (F.relu, torch.relu, nn.Linear, print, lambda x: F.relu(x).cell), marks=pytest.mark.slow
        ),
        pytest.param(lambda model: nn.Linear, marks=pytest.mark.slow),
        ringed,
    ],
)
def test_what_is_copied_with_the_module_or_constant_may_be_held_anywhere(hold: Any) -> None:
    train_model = proven(Holding(hold), "a")
    assert "peers.b1.holder.inner.weight" in train_model.state_dict()


def test_state_may_be_held_anyhow_where_module_and_state_lie_in_the_trunk() -> None:
    for hold in (lambda a: [a.weight], lambda a: lambda x: F.linear(x, a.weight), weakref.ref):
        model = Holding()
        model.a.__dict__["held"] = hold(model.a)
        proven(model, "holder")
    proven(Holding(lambda model: model.a), "holder")


def test_attributes_of_a_name_that_also_is_a_global_reach_nothing() -> None:
    model = Holding()
    scope: dict[str, Any] = {"inner": model}
    exec("function = lambda x, self: self.inner(x)", scope)
    model.holder.held = scope["function"]
    train_model = proven(model, "a")
    assert train_model.get_submodule("peers.b1.holder").held is scope["function"]


def test_hooks_may_watch_what_they_like() -> None:
    model, seen = Holding(), []
    model.holder.register_forward_hook(lambda module, inputs, output: seen.append((module, model.a)))
    train_model = proven(model, "a")
    seen.clear()
    train_model(X)
    assert seen == [(model.holder, model.a), (train_model.get_submodule("peers.b1.holder"), model.a)]


@pytest.mark.parametrize("split", ["first", "mix"])
def test_what_torchs_own_modules_hold_is_no_reason_to_refuse(split: str) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.mix = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4)
            self.last = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager"))
            self.last[0].compile(backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.mix(self.lstm(self.first(x))[0]))[0])

    proven(Sequence(), split)
