"""Weights that are set during training, the two terms by themselves, losses that aren't reduced, class weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxcollab
from fxcollab.errors import ObjectiveError
from tests.objectives.test_masks import CLASSES, OBJECTIVES, labels, logits, padded


def test_two_weights_are_beta_and_what_it_leaves() -> None:
    z, y = logits(3, 4, CLASSES), labels(4)
    weights = fxcollab.CollaborativeLoss(hard_weight=0.3, soft_weight=0.7)
    assert torch.equal(weights(z, y), fxcollab.CollaborativeLoss(beta=0.3)(z, y))


@pytest.mark.parametrize("detach", [True, False])
def test_weights_need_not_add_up_to_one(detach: bool) -> None:
    z, y = logits(3, 4, CLASSES), labels(4)
    loss = fxcollab.CollaborativeLoss(hard_weight=1.0, soft_weight=3.0, detach=detach)
    parts = loss.parts(z, y)
    torch.testing.assert_close(loss(z, y), sum(parts.hard) + 3 * sum(parts.soft))
    assert loss.beta is None


def test_a_weight_that_is_not_given_is_one() -> None:
    loss = fxcollab.CollaborativeLoss(soft_weight=0.25)
    assert (loss.hard_weight, loss.soft_weight) == (1.0, 0.25)


def test_a_ramp_is_an_assignment() -> None:
    z, y = logits(2, 4, CLASSES), labels(4)
    loss = fxcollab.CollaborativeLoss(hard_weight=1.0, soft_weight=0.0)
    assert loss(z, y) == sum(nn.functional.cross_entropy(head, y) for head in z)
    loss.soft_weight, loss.temperature = 0.5, 3.0
    expected = fxcollab.CollaborativeLoss(hard_weight=1.0, soft_weight=0.5, temperature=3.0)
    assert torch.equal(loss(z, y), expected(z, y))
    loss.beta = 0.2
    assert torch.equal(loss(z, y), fxcollab.CollaborativeLoss(0.2, 3.0)(z, y))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", 0, "beta must be in (0, 1], not 0."),
        ("beta", nn.Parameter(torch.tensor(0.5)), "beta must be a number"),
        ("hard_weight", -1.0, "hard_weight must be finite and at least 0, not -1.0."),
        ("soft_weight", float("inf"), "soft_weight must be finite and at least 0, not inf."),
        ("temperature", 0, "temperature must be finite and above 0, not 0."),
        ("temperature", nn.Parameter(torch.tensor(2.0)), "temperature must be a number"),
    ],
)
def test_what_is_set_is_checked(name: str, value: Any, message: str) -> None:
    loss = fxcollab.CollaborativeLoss(0.3, 4.0)
    with pytest.raises(ObjectiveError) as caught:
        setattr(loss, name, value)
    assert message in str(caught.value)
    assert caught.value.hint
    assert (loss.beta, loss.temperature) == (0.3, 4.0)


@pytest.mark.parametrize("make", [fxcollab.MutualLoss, fxcollab.KDCLLoss])
def test_other_objectives_check_what_is_set(make: Any) -> None:
    loss = make()
    for name in ("weight", "temperature"):
        with pytest.raises(ObjectiveError, match=f"{name} must be"):
            setattr(loss, name, -1)
    with pytest.raises(ObjectiveError, match="beta must be in"):
        fxcollab.DistillationLoss().beta = 2


def test_beta_and_weights_exclude_each_other() -> None:
    with pytest.raises(ObjectiveError, match="not both") as caught:
        fxcollab.CollaborativeLoss(0.25, soft_weight=1.0)
    assert "hard_weight=0.25, soft_weight=0.75" in str(caught.value)


def test_weights_are_printed_where_they_do_not_add_up() -> None:
    assert "hard_weight=1.0, soft_weight=2.0" in repr(fxcollab.CollaborativeLoss(soft_weight=2.0))
    assert "_weight=" not in repr(fxcollab.CollaborativeLoss(0.3))


# --- Parts ---


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_are_what_is_weighted(name: str) -> None:
    z, y = logits(3, 4, CLASSES, 6), padded(4, 6)
    loss = OBJECTIVES[name]()
    parts, (hard, soft) = loss.parts(z, y), loss.weights
    expected = sum(hard * h + soft * s for h, s in zip(parts.hard, parts.soft, strict=True))
    torch.testing.assert_close(loss(z, y), expected)
    assert len(parts.hard) == len(parts.soft) == 3


def test_parts_of_a_distillation_take_its_teachers() -> None:
    z, y, teachers = logits(2, 4, CLASSES), labels(4), logits(3, 4, CLASSES, seed=1)
    loss = fxcollab.DistillationLoss(0.3)
    parts = loss.parts(z, y, teachers)
    torch.testing.assert_close(loss(z, y, teachers), 0.3 * sum(parts.hard) + 0.7 * sum(parts.soft))


# --- Not reduced ---


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("shape", [(), (6,)], ids=["samples", "positions"])
def test_losses_that_are_not_reduced_average_to_the_mean(shape: tuple[int, ...], detach: bool) -> None:
    z, y = logits(3, 4, CLASSES, *shape), labels(4, *shape)
    each = fxcollab.CollaborativeLoss(detach=detach, reduction="none")
    mean = fxcollab.CollaborativeLoss(detach=detach)
    assert each(z, y).shape == y.shape
    torch.testing.assert_close(each(z, y).mean(), mean(z, y))
    for got, expected in zip(each.parts(z, y), mean.parts(z, y), strict=True):
        torch.testing.assert_close([term.mean() for term in got], expected)


def test_ignored_positions_are_zero_where_nothing_is_reduced() -> None:
    z, y = logits(2, 4, CLASSES, 6), padded(4, 6)
    each = fxcollab.CollaborativeLoss(reduction="none")(z, y)
    assert not each[y == -100].any()
    torch.testing.assert_close(each.sum(), fxcollab.CollaborativeLoss(reduction="sum")(z, y))


@pytest.mark.parametrize(
    "hard",
    [
        nn.HuberLoss(reduction="none", delta=0.5),
        lambda z, y: nn.functional.smooth_l1_loss(z, y, reduction="none"),
        nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.full((3,), 2.0).double()),
    ],
    ids=["huber", "own", "binary"],
)
def test_every_value_has_a_loss_in_other_tasks(hard: Any) -> None:
    z, y = logits(2, 4, 3), torch.rand(4, 3).double()
    task = "regression" if callable(hard) and not isinstance(hard, nn.Module) else None
    each = fxcollab.CollaborativeLoss(hard=hard, task=task, reduction="none")
    assert each(z, y).shape == (4, 3)
    torch.testing.assert_close(sum(each.parts(z, y).hard), sum(hard(head, y) for head in z))


def test_a_partial_of_torchs_loss_keeps_its_options_towards_the_consensus() -> None:
    from functools import partial

    z, y = logits(2, 4, 3), torch.rand(4, 3).double()
    by_module = fxcollab.CollaborativeLoss(hard=nn.HuberLoss(delta=0.5))
    by_function = fxcollab.CollaborativeLoss(hard=partial(nn.functional.huber_loss, delta=0.5))
    torch.testing.assert_close(by_function(z, y), by_module(z, y))


def test_a_loss_per_position_that_is_not_finite_says_how_many() -> None:
    z, y = logits(2, 4, CLASSES), labels(4)
    with torch.no_grad():
        z[1][2, 0] = float("nan")
    with pytest.raises(ObjectiveError, match="1 of 4 losses are not finite") as caught:
        fxcollab.CollaborativeLoss(reduction="none", consensus_on=lambda target: target < 0)(z, y)
    assert "head 1" in str(caught.value)


# --- Class weights ---


def test_the_soft_term_weighs_classes_on_request() -> None:
    z, y, weight = logits(2, 4, CLASSES), labels(4), torch.rand(CLASSES).double()
    loss = fxcollab.CollaborativeLoss(hard=nn.CrossEntropyLoss(weight), class_weights=True, temperature=3.0)
    for own, other, soft in zip(z, z[::-1], loss.parts(z, y).soft, strict=True):
        q, log_p = (other / 3).softmax(1), (own / 3).log_softmax(1)
        torch.testing.assert_close(soft, -9 * (weight * q * log_p).sum(1).mean())


def test_the_binary_soft_term_weighs_positives_on_request() -> None:
    z, y, weight = logits(2, 4, 3), torch.ones(4, 3).double(), torch.tensor([0.5, 1.0, 4.0]).double()
    loss = fxcollab.CollaborativeLoss(hard=nn.BCEWithLogitsLoss(pos_weight=weight), class_weights=True)
    for own, other, soft in zip(z, z[::-1], loss.parts(z, y).soft, strict=True):
        q, p = (other / 2).sigmoid(), (own / 2).sigmoid()
        torch.testing.assert_close(soft, -4 * (weight * q * p.log() + (1 - q) * (1 - p).log()).mean())


@pytest.mark.parametrize("options", [{}, {"hard": nn.MSELoss()}, {"hard": nn.BCEWithLogitsLoss()}])
def test_weights_of_classes_that_there_are_not_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError, match="can't weigh classes") as caught:
        fxcollab.CollaborativeLoss(class_weights=True, **options)
    assert "weight=..." in str(caught.value)
