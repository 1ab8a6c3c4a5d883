"""Where heads learn from each other: on labelled positions, on all, by a mask; batches without labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import ObjectiveError
from fxcollab.objectives.objective import Objective

CLASSES, PADDING = 5, -100
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "collaborative": fxcollab.CollaborativeLoss,
    "collaborative, by operators": partial(fxcollab.CollaborativeLoss, detach=False),
    "mutual": fxcollab.MutualLoss,
    "KDCL": fxcollab.KDCLLoss,
}


def logits(heads: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(heads)]


def labels(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(0))


def padded(*shape: int) -> Tensor:
    """Labels of which each row ignores its last two, the first row all."""
    y = labels(*shape)
    y[..., -2:] = PADDING
    y[0] = PADDING
    return y


@pytest.fixture(params=OBJECTIVES, ids=str)
def objective(request: pytest.FixtureRequest) -> Callable[..., Objective]:
    return OBJECTIVES[request.param]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_positions_get_no_gradient_and_the_others_that_of_the_loss_on_them(
    reduction: str, objective: Callable[..., Objective]
) -> None:
    z, y = logits(3, 4, CLASSES, 6), padded(4, 6)
    loss, kept = objective(reduction=reduction), y != PADDING
    total = loss(z, y)
    gradients = torch.autograd.grad(total, z)
    alone = [head.detach().movedim(1, -1)[kept].requires_grad_() for head in z]
    expected = loss(alone, y[kept])
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-13)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, alone), strict=True):
        by_class = gradient.movedim(1, -1)
        assert not by_class[~kept].any()
        torch.testing.assert_close(by_class[kept], wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "hard",
    [
        nn.CrossEntropyLoss(ignore_index=3),
        partial(nn.functional.cross_entropy, ignore_index=3),
        nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1),
    ],
    ids=["module", "partial", "smoothed"],
)
def test_the_label_that_the_hard_loss_ignores_is_left_out(hard: Any) -> None:
    z, y = logits(2, 6, CLASSES), torch.tensor([3, 0, 3, 1, 2, 3])
    kept = y != 3
    loss = fxcollab.CollaborativeLoss(hard=hard)
    torch.testing.assert_close(loss(z, y), loss([head[kept] for head in z], y[kept]))


def test_a_consensus_on_all_counts_ignored_positions_too() -> None:
    z, y = logits(2, 3, CLASSES), torch.tensor([1, 9, 2])
    hard = nn.CrossEntropyLoss(ignore_index=9)
    soft = sum(fxcollab.CollaborativeLoss().parts(z, None).soft)
    expected = 0.5 * sum(hard(head, y) for head in z) + 0.5 * soft
    torch.testing.assert_close(fxcollab.CollaborativeLoss(hard=hard, consensus_on="all")(z, y), expected)


@pytest.mark.parametrize("per", ["sample", "position"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_callable_says_where_heads_learn_from_each_other(detach: bool, per: str) -> None:
    z, y = logits(3, 4, CLASSES, 2), labels(4, 2)
    chosen = torch.tensor([True, False, True, False])
    mask = chosen if per == "sample" else chosen[:, None].expand(4, 2)
    parts = fxcollab.CollaborativeLoss(detach=detach, consensus_on=lambda target: mask).parts(z, y)
    everywhere = fxcollab.CollaborativeLoss(detach=detach).parts([head[chosen] for head in z], None)
    torch.testing.assert_close(parts.soft, everywhere.soft)
    torch.testing.assert_close(parts.hard, [nn.functional.cross_entropy(head, y) for head in z])


def test_a_mask_of_samples_covers_the_labels_of_a_multi_label_task() -> None:
    z, y, chosen = logits(2, 4, 3), torch.zeros(4, 3).double(), torch.tensor([True, True, False, False])
    loss = fxcollab.CollaborativeLoss(task="multi-label", consensus_on=lambda target: chosen)
    expected = loss.parts([head[chosen] for head in z], None).soft
    torch.testing.assert_close(loss.parts(z, y).soft, expected)


@pytest.mark.parametrize(
    "mask", [torch.ones(4), torch.ones(3, dtype=torch.bool), None], ids=["float", "short", "None"]
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor | None) -> None:
    with pytest.raises(ObjectiveError, match="consensus_on returned") as caught:
        fxcollab.CollaborativeLoss(consensus_on=lambda target: mask)(logits(2, 4, CLASSES), labels(4))
    assert caught.value.hint


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="'labelled', 'all', or a callable of the target, not 'unlabelled'"):
        fxcollab.CollaborativeLoss(consensus_on="unlabelled")


# --- Without labels ---


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_batch_without_labels_has_the_soft_term_with_its_weight(detach: bool, task: str) -> None:
    z = logits(3, 4, CLASSES)
    loss = fxcollab.CollaborativeLoss(0.3, task=task, detach=detach)
    parts = loss.parts(z, None)
    assert all(hard == 0 for hard in parts.hard)
    torch.testing.assert_close(loss(z, None), 0.7 * sum(parts.soft))
    torch.testing.assert_close(loss.per_head(z, None), [0.7 * soft for soft in parts.soft])


def test_the_soft_term_without_labels_is_that_of_fully_labelled_ones() -> None:
    z = logits(3, 4, CLASSES)
    loss = fxcollab.CollaborativeLoss()
    torch.testing.assert_close(loss.parts(z, None).soft, loss.parts(z, labels(4)).soft)


def test_mutual_learning_needs_no_labels_and_kdcl_does() -> None:
    z = logits(3, 4, CLASSES)
    torch.testing.assert_close(
        fxcollab.MutualLoss(weight=2.0)(z, None), 2 * sum(fxcollab.MutualLoss().parts(z, labels(4)).soft)
    )
    with pytest.raises(ObjectiveError, match=r"class indices of shape \(4,\), the target is None"):
        fxcollab.KDCLLoss()(z, None)


@pytest.mark.parametrize(
    "hard",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.rand(CLASSES).double()),
    ],
    ids=["plain", "smoothed", "weighted"],
)
@pytest.mark.parametrize("consensus_on", ["labelled", "all"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_batch_in_which_every_label_is_ignored_has_finite_gradients(
    detach: bool, consensus_on: str, hard: nn.Module
) -> None:
    z, y = logits(3, 4, CLASSES), torch.full((4,), PADDING)
    total = fxcollab.CollaborativeLoss(hard=hard, consensus_on=consensus_on, detach=detach)(z, y)
    gradients = torch.stack(torch.autograd.grad(total, z))
    if consensus_on == "labelled":
        assert total == 0
        assert not gradients.any()
    else:
        expected = fxcollab.CollaborativeLoss(detach=detach)(z, None)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(gradients, torch.stack(torch.autograd.grad(expected, z)))


def test_labels_alone_have_nothing_to_learn_from_a_batch_without_them() -> None:
    z = logits(2, 4, CLASSES)
    total = fxcollab.CollaborativeLoss(beta=1)(z, None)
    assert total == 0
    assert not torch.stack(torch.autograd.grad(total, z)).any()


@pytest.mark.parametrize("target", ["ignored", "none"])
def test_masks_compile_to_one_graph(target: str) -> None:
    torch.compiler.reset()
    z, y = logits(3, 4, CLASSES), None if target == "none" else torch.tensor([1, PADDING, 2, PADDING])
    loss = fxcollab.CollaborativeLoss()
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = loss(z, y)
    torch.testing.assert_close(step(z, y), expected)
    torch.testing.assert_close(torch.autograd.grad(step(z, y), z), torch.autograd.grad(expected, z))
