"""Language models: logits (N, T, V) with labels (N, T), shifted or not, and gradient accumulation over them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import ObjectiveError
from tests.objectives.test_masks import CLASSES, labels, logits, padded

Causal = partial(fxcollab.CollaborativeLoss, tokens="shifted")


def by_hand(z: list[Tensor], y: Tensor) -> tuple[list[Tensor], Tensor]:
    """Logits and labels of the tokens that a causal model is scored on."""
    return [head[:, :-1].flatten(0, 1) for head in z], y[:, 1:].flatten()


@pytest.mark.parametrize("detach", [True, False])
def test_shifted_tokens_are_scored_by_the_next_label(detach: bool) -> None:
    z, y = logits(3, 4, 7, CLASSES), padded(4, 7)
    got, expected = Causal(detach=detach)(z, y), fxcollab.CollaborativeLoss(detach=detach)(*by_hand(z, y))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(expected, z), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft labels"])
def test_aligned_tokens_are_scored_by_their_own_label(soft: bool) -> None:
    z, y = logits(2, 4, 7, CLASSES), padded(4, 7)
    if soft:
        y = torch.rand(4, 7, CLASSES).double().softmax(-1)
    got = fxcollab.CollaborativeLoss(tokens="aligned")(z, y)
    expected = fxcollab.CollaborativeLoss()([head.flatten(0, 1) for head in z], y.flatten(0, 1))
    torch.testing.assert_close(got, expected)


def test_the_hard_term_is_the_loss_of_the_library(  # which shifts in its own way
) -> None:
    modeling = pytest.importorskip("transformers.loss.loss_utils")
    z, y = logits(2, 4, 7, CLASSES), padded(4, 7)
    expected = [modeling.ForCausalLMLoss(head, y, CLASSES) for head in z]
    torch.testing.assert_close(Causal().parts(z, y).hard, expected, check_dtype=False)


def test_one_loss_a_token_has_the_shape_of_the_tokens() -> None:
    z, y = logits(2, 4, 7, CLASSES), padded(4, 7)
    each = Causal(reduction="none")
    assert each(z, y).shape == (4, 7)
    assert not each(z, y)[:, -1].any(), "nothing labels the last token"
    torch.testing.assert_close(each(z, y).sum(), Causal(reduction="sum")(z, y))
    assert {part.shape for parts in each.parts(z, y) for part in parts} == {(4, 7)}
    assert {head.shape for head in each.per_head(z, y)} == {(4, 7)}


def test_prompts_without_labels_teach_heads_only_on_request() -> None:
    z, y = logits(2, 4, 7, CLASSES), padded(4, 7)
    gradient = torch.autograd.grad(Causal()(z, y), z)[0]
    assert not gradient[0].any(), "nothing in the first row is labelled"
    gradient = torch.autograd.grad(Causal(consensus_on="all")(z, y), z)[0]
    assert gradient[0].abs().sum(-1).all()


def test_labels_of_tokens_name_the_option() -> None:
    with pytest.raises(ObjectiveError, match=r"fit logits of shape \(4, 7, 5\)") as caught:
        fxcollab.CollaborativeLoss()(logits(2, 4, 7, CLASSES), labels(4, 7))
    assert "tokens='shifted'" in caught.value.hint


def test_the_option_is_for_classes() -> None:
    with pytest.raises(ObjectiveError, match="tokens is for classification"):
        fxcollab.CollaborativeLoss(task="regression", tokens="aligned")


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((4, CLASSES), labels(4), r"\(N, T, V\), this is a tensor of shape \(4, 5\)"),
        ((4, 7, CLASSES), labels(4, 6), "doesn't fit 4 x 7 tokens"),
        ((4, 7, CLASSES), torch.rand(4, 7, CLASSES), "Soft labels can't be shifted"),
    ],
)
def test_what_is_no_token_is_refused(shape: tuple[int, ...], target: Tensor, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message) as caught:
        Causal()(logits(2, *shape), target)
    assert caught.value.hint


# --- Accumulation ---


@pytest.mark.parametrize("number", [int, torch.tensor], ids=["int", "tensor"])
@pytest.mark.parametrize("detach", [True, False])
def test_accumulated_batches_are_one_large_batch(detach: bool, number: Any) -> None:
    z, y = logits(3, 4, 7, CLASSES), padded(4, 7)
    loss = Causal(detach=detach)
    labelled = number(int((y[:, 1:] != -100).sum()))
    halves = [loss([head[rows] for head in z], y[rows], num_items=labelled) for rows in (slice(1), slice(1, 4))]
    torch.testing.assert_close(sum(halves), loss(z, y))
    gradients = torch.autograd.grad(sum(halves), z)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(z, y), z))


def test_samples_accumulate_without_ignored_labels_too() -> None:
    z, y = logits(2, 6, 3), torch.rand(6, 3).double()
    loss = fxcollab.CollaborativeLoss(hard=nn.MSELoss())
    parts = [loss([head[rows] for head in z], y[rows], num_items=y.numel()) for rows in (slice(2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), loss(z, y))


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"consensus_on": "all"}, labels(4)),
        ({}, None),
        ({"hard": nn.CrossEntropyLoss(torch.ones(CLASSES).double())}, labels(4)),
    ],
    ids=["on all", "no labels", "class weights"],
)
def test_means_over_other_numbers_cannot_be_accumulated(options: Any, target: Any) -> None:
    with pytest.raises(ObjectiveError, match="over the labelled positions alone") as caught:
        fxcollab.CollaborativeLoss(**options)(logits(2, 4, CLASSES), target, num_items=8)
    assert "loss.parts" in caught.value.hint


def test_no_items_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="num_items must be above 0"):
        fxcollab.CollaborativeLoss()(logits(2, 4, CLASSES), labels(4), num_items=0)


def test_shifted_labels_may_be_bytes() -> None:
    z, y = logits(2, 4, 7, CLASSES), labels(4, 7)
    assert torch.equal(Causal()(z, y.to(torch.uint8)), Causal()(z, y))


def test_a_sum_needs_no_number_of_items() -> None:
    with pytest.raises(ObjectiveError, match="num_items is for the mean"):
        fxcollab.CollaborativeLoss(reduction="sum")(logits(2, 4, CLASSES), labels(4), num_items=4)


# --- Outputs that are tuples ---


def test_logits_are_found_by_their_place_in_a_tuple() -> None:
    z, y = logits(2, 4, CLASSES), labels(4)
    outputs = tuple((None, head) for head in z)
    expected = fxcollab.CollaborativeLoss()(z, y)
    for place in (1, -1):
        assert torch.equal(fxcollab.CollaborativeLoss(logits=place)(outputs, y), expected)
    with pytest.raises(ObjectiveError, match="no logits under 2"):
        fxcollab.CollaborativeLoss(logits=2)(outputs, y)
