"""The loss of last hidden states and output layers is that of their logits, which are never held whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxcollab
from fxcollab.errors import ObjectiveError
from fxcollab.objectives import hidden as hidden_states
from tests.live_bytes import LiveBytes

FIELDS = ("hidden", "weight", "bias")


def outputs_of(heads: int, shape: tuple[int, ...], classes: int, dtype: torch.dtype, bias: bool) -> Any:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    names = FIELDS if bias else FIELDS[:2]
    parts = {"hidden": shape, "weight": (classes, shape[-1]), "bias": (classes,)}
    return tuple({name: made(*parts[name]) for name in names} for _ in range(heads))


def gradients(loss: Tensor, outputs: Any) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, [part for head in outputs for part in head.values()]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [None, "shifted"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_those_of_the_logits(
    bias: bool, tokens: Any, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "AT_A_TIME", 4 * 11)  # four rows, and the last ones fewer
    outputs = outputs_of(3, (2, 5, 6) if tokens else (10, 6), 11, torch.float64, bias)
    target = torch.arange(10) % 11
    target[3] = -100
    target = target.view(2, 5) if tokens else target
    options: Any = {"tokens": tokens, "reduction": reduction, "beta": 0.3}
    ours = fxcollab.CollaborativeLoss(logits=FIELDS if bias else FIELDS[:2], **options)(outputs, target)
    logits = tuple(nn.functional.linear(*head.values()) for head in outputs)
    theirs = fxcollab.CollaborativeLoss(**options)(logits, target)
    assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert_close(gradients(ours, outputs), gradients(theirs, outputs), rtol=1e-10, atol=1e-13)
    parts = fxcollab.CollaborativeLoss(logits=FIELDS if bias else FIELDS[:2], **options).per_head(outputs, target)
    assert_close(sum(parts), theirs)


def test_items_of_accumulated_batches_and_masks_count() -> None:
    outputs, target = outputs_of(2, (8, 6), 5, torch.float64, True), torch.arange(8) % 5
    target[2:4] = -100
    logits = tuple(nn.functional.linear(*head.values()) for head in outputs)
    for options in ({}, {"consensus_on": "all"}):
        items = None if options else 20
        ours = fxcollab.CollaborativeLoss(logits=FIELDS, **options)(outputs, target, num_items=items)
        assert_close(ours, fxcollab.CollaborativeLoss(**options)(logits, target, num_items=items))


def test_less_is_held_than_the_logits_of_one_head() -> None:
    rows, classes = 256, 4096
    outputs = outputs_of(2, (rows, 16), classes, torch.bfloat16, False)
    loss = fxcollab.CollaborativeLoss(logits=FIELDS[:2])
    before = hidden_states.AT_A_TIME
    try:
        hidden_states.AT_A_TIME = 8 * classes
        with LiveBytes([]) as live:
            loss(outputs, torch.arange(rows)).backward()
    finally:
        hidden_states.AT_A_TIME = before
    assert live.peak < rows * classes * 2


def test_options_that_need_all_logits_are_refused() -> None:
    outputs, target = outputs_of(2, (4, 6), 5, torch.float32, False), torch.arange(4)
    for options in ({"detach": False}, {"hard": nn.CrossEntropyLoss(label_smoothing=0.1)}, {"reduction": "none"}):
        with pytest.raises(ObjectiveError, match="hidden states"):
            fxcollab.CollaborativeLoss(logits=FIELDS[:2], **options)(outputs, target)
