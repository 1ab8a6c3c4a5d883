"""Forwards that ask for gradients, hook them, enable them or compute them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CaptureError, SplitError
from tests.tracing.question_helpers import MORE, NOTES, Net, X, agrees, made, proven


class HooksWhatHasAGradient(Net):
    """Grad-CAM."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x))
        if h.requires_grad:
            h.register_hook(lambda gradient: self.seen.append(gradient))
        return self.d(self.c(h))


class RetainsTheGradient(HooksWhatHasAGradient):
    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x))
        if not h.requires_grad:
            return self.d(self.c(h))
        h.retain_grad()
        h.register_hook(self.seen.append)
        return self.d(self.c(h))


class HooksAFunction(HooksWhatHasAGradient):
    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x))
        if any(value.requires_grad for value in (x, h)) and not x.requires_grad:
            h.register_hook(self.keep)
        return self.d(self.c(h))

    def keep(self, gradient: Tensor) -> None:
        self.seen.append(gradient)


@pytest.mark.parametrize("make", [HooksWhatHasAGradient, RetainsTheGradient, HooksAFunction])
@pytest.mark.parametrize("split", ["a", "b"])
def test_whether_a_value_requires_grad_is_as_in_training_and_calls_without_gradients_work(
    make: type[HooksWhatHasAGradient], split: str
) -> None:
    model = make()
    train_model = made(model, (X,), [split])
    sum(head.sum() for head in train_model(MORE)).backward()
    assert len(model.seen) == 2  # one for each head
    with torch.no_grad():
        for training in (True, False):
            train_model.train(training)
            assert agrees(train_model, model, X)
    assert any("whether a tensor requires grad or not" in note for note in train_model.meta[NOTES])


class ScalesTheGradient(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * 0.1)
            with torch.no_grad():
                h.register_hook(lambda gradient: gradient + 1)
        return self.tail(h)


@pytest.mark.parametrize("split", ["a", "b"])
def test_a_hook_that_changes_gradients_changes_them_once_for_each_head(split: str) -> None:
    proven(ScalesTheGradient(), splits=[split])


def test_a_forward_that_hooks_what_has_a_gradient_is_proved() -> None:
    proven(HooksWhatHasAGradient())


class TrainsUnlessItRequiresGrad(Net):
    def forward(self, x: Tensor) -> Any:
        return self.tail(self.a(x if x.requires_grad else 2 * x))


def test_an_input_that_requires_grad_where_the_example_did_not_is_refused() -> None:
    train_model = made(TrainsUnlessItRequiresGrad(), (X,))
    train_model(MORE)
    with pytest.raises(CaptureError, match="requires grad"):
        train_model(MORE.clone().requires_grad_())


class EnablesGradients(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return self.tail(self.a(x))


class EnablesThemByADecorator(Net):
    @torch.enable_grad()
    def tail(self, h: Tensor) -> Any:
        return super().tail(h)


class SetsThem(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(mode=True):
            return self.tail(self.a(x))


@pytest.mark.parametrize("make", [EnablesGradients, EnablesThemByADecorator, SetsThem])
def test_gradients_that_a_forward_enables_are_there_in_training_and_their_loss_elsewhere_is_said(
    make: type[Net],
) -> None:
    model = make()
    train_model = made(model, (X,))
    assert agrees(train_model, model, MORE) and train_model(MORE)[0].requires_grad
    assert ["torch.enable_grad()" in note for note in train_model.meta[NOTES]] == [True]
    enter = torch.enable_grad.__enter__
    assert "fxcollab" not in enter.__module__


class AsksForTheMode(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = x if torch.is_grad_enabled() else x + 1
        return self.tail(self.a(x) if torch.is_grad_enabled() else x)


def test_that_a_forward_goes_one_way_in_both_grad_modes_is_said() -> None:
    model = AsksForTheMode()
    train_model = made(model, (X,))
    assert agrees(train_model, model, MORE)
    assert ["whether gradients are enabled or not" in note for note in train_model.meta[NOTES]] == [True]


class SuspendsThem(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            scale = self.a(x).abs().max()
        with torch.set_grad_enabled(False):
            scale = scale + 1
        return self.tail(self.a(x) / scale)


def test_a_forward_that_only_suspends_gradients_has_no_limitation() -> None:
    assert made(SuspendsThem(), (X,)).meta[NOTES] == ()


class Potential(nn.Module):
    """An energy, and the forces that follow from it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, positions: Tensor) -> Any:
        positions = positions.detach().requires_grad_(True)
        energy = self.c(torch.tanh(self.b(torch.tanh(self.a(positions))))).sum()
        return energy, -torch.autograd.grad(energy, positions, create_graph=True)[0]


class PotentialOfFeatures(Potential):
    """The derivative lies behind a split at ``a``."""

    def forward(self, positions: Tensor) -> Any:
        h = torch.tanh(self.a(positions))
        features = h.detach()
        features.requires_grad = True
        energy = self.c(torch.tanh(self.b(features))).sum()
        (forces,) = torch.autograd.grad(energy, features, create_graph=True)
        return self.c(h).sum(), forces


class PotentialInTheTrunk(Potential):
    """The derivative lies before a split at ``b``."""

    def forward(self, positions: Tensor) -> Any:
        positions = positions.detach().requires_grad_()
        h = self.a(positions)
        forces = torch.autograd.grad(outputs=torch.tanh(h).sum(), inputs=[positions], create_graph=True)[0]
        return self.c(self.b(h)).sum(), forces


@pytest.mark.parametrize(
    ("make", "splits"), [(Potential, []), (PotentialOfFeatures, ["a"]), (PotentialInTheTrunk, ["b"])]
)
def test_derivatives_in_a_forward_and_their_gradients_are_those_of_separate_originals(
    make: type[Potential], splits: list[str]
) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(5, 3).double()
    train_model = fxcollab.transform(
        model, "simple" if splits else "multi-instance", splits, heads=2, example_inputs=(x,), seed=0
    )
    originals = [copy.deepcopy(fxcollab.prune(train_model, head)) for head in range(2)]
    outputs, expected = train_model(x), [original(x) for original in originals]
    torch.testing.assert_close(outputs, tuple(expected))
    for results in (outputs, expected):
        torch.stack([energy + forces.square().sum() for energy, forces in results]).sum().backward()
    found = {name: parameter.grad for name, parameter in train_model.named_parameters() if parameter.grad is not None}
    gradients = [{name: p.grad for name, p in original.named_parameters()} for original in originals]
    for name in dict(model.named_parameters()):
        if f"peers.b1.{name}" in found:
            torch.testing.assert_close([found[name], found[f"peers.b1.{name}"]], [g[name] for g in gradients])
        else:
            torch.testing.assert_close(found[name], sum(g[name] for g in gradients) / 2)


@pytest.mark.parametrize("make", [Potential, PotentialInTheTrunk])
def test_a_derivative_through_a_split_is_refused(make: type[Potential]) -> None:
    with pytest.raises(SplitError, match="differentiates through split 'a'") as caught:
        made(make(), (torch.randn(5, 3),), ["a"])
    assert caught.value.why and "multi-instance" in str(caught.value.hint)
    fxcollab.transform(make(), "multi-instance", example_inputs=(torch.randn(5, 3),), heads=2)


def test_a_derivative_by_the_input_itself_is_refused_between_instances() -> None:
    class ByTheInput(Potential):
        def forward(self, positions: Tensor) -> Any:
            energy = self.c(self.b(self.a(positions)).tanh()).sum()
            return energy, torch.autograd.grad(energy, positions, create_graph=True)[0]

    given = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(SplitError, match="differentiates through the input") as caught:
        fxcollab.transform(ByTheInput(), "multi-instance", example_inputs=(given,), heads=2)
    assert "detach" in str(caught.value.hint)
