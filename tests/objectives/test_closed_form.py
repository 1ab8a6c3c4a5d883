"""The collaborative loss in closed form against the same by operators: values, gradients, and what may use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcollab.objectives import closed_form
from fxcollab.objectives.collaborative import CollaborativeLoss
from tests.live_bytes import LiveBytes

CLASSES = 5


def some_logits(heads: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads)
    return [
        (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(heads)
    ]


def indices(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the closed form was used, call by call."""
    calls: list[bool] = []
    decide = closed_form.may_be_used

    def watched(heads: list[Tensor], target: Tensor) -> bool:
        calls.append(decide(heads, target))
        return calls[-1]

    monkeypatch.setattr(closed_form, "may_be_used", watched)
    return calls


def by_operators(loss: CollaborativeLoss, z: list[Tensor], y: Tensor) -> Tensor:
    parts = loss.losses(loss.heads(z), loss.task.target(y, z[0]))
    return sum(parts[1:], parts[0])


def assert_same(loss: CollaborativeLoss, z: list[Tensor], y: Tensor, used: list[bool], **tolerance: float) -> None:
    used.clear()
    got, expected = loss(z, y), by_operators(loss, z, y)
    assert used == [True]
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(got, expected, **tolerance)
    found = torch.autograd.grad(3 * got, z)
    torch.testing.assert_close(found, torch.autograd.grad(3 * expected, z), **tolerance)


@pytest.mark.parametrize("in_cache", [1, 7, 1 << 17])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_same_loss(
    temperature: float, reduction: str, in_cache: int, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_form, "IN_CACHE", in_cache)
    loss = CollaborativeLoss(0.3, temperature, reduction=reduction)
    assert_same(loss, some_logits(3, 7, CLASSES), indices(7), used)


def test_soft_labels_need_not_sum_to_one(used: list[bool]) -> None:
    y = torch.rand(4, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_same(CollaborativeLoss(0.3), some_logits(2, 4, CLASSES), y, used)


def test_ignored_labels_have_no_hard_term(used: list[bool]) -> None:
    y = torch.tensor([1, -100, 4, -100])
    assert_same(CollaborativeLoss(0.3), some_logits(2, 4, CLASSES), y, used)
    assert_same(CollaborativeLoss(0.3, reduction="sum"), some_logits(2, 4, CLASSES), y, used)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dense_outputs(layout: torch.memory_format, dtype: torch.dtype, used: list[bool]) -> None:
    z = [head.detach().to(memory_format=layout).requires_grad_() for head in some_logits(3, 2, CLASSES, 3, 4)]
    assert_same(CollaborativeLoss(), z, indices(2, 3, 4).to(dtype), used)


def test_large_logits_stay_finite(used: list[bool]) -> None:
    z = [(1e4 * head.detach()).requires_grad_() for head in some_logits(2, 3, CLASSES, dtype=torch.float32)]
    assert_same(CollaborativeLoss(), z, indices(3), used, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_get_gradients_of_their_own_type(dtype: torch.dtype, used: list[bool]) -> None:
    z = some_logits(3, 4, CLASSES, dtype=dtype)
    loss, y = CollaborativeLoss(), indices(4)
    gradients = torch.autograd.grad(loss(z, y), z)
    assert used == [True]
    assert all(gradient.dtype == dtype for gradient in gradients)
    expected = torch.autograd.grad(by_operators(loss, [head.float() for head in z], y), z)
    torch.testing.assert_close(gradients, expected, rtol=1e-2, atol=1e-3)


def test_backward_may_run_twice(used: list[bool]) -> None:
    z, y = some_logits(3, 4, CLASSES), indices(4)
    loss = CollaborativeLoss()(z, y)
    first = torch.autograd.grad(loss, z, retain_graph=True)
    second = torch.autograd.grad(loss, z)
    assert used == [True]
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def test_gradients_are_differentiated_again(used: list[bool]) -> None:
    loss, y = CollaborativeLoss(0.3, 2.0), indices(3)
    z = some_logits(2, 3, CLASSES)
    total = loss(z, y)
    assert used == [True]
    gradients = torch.autograd.grad(total, z, create_graph=True)
    expected = torch.autograd.grad(by_operators(loss, z, y), z, create_graph=True)
    weights = some_logits(2, 3, CLASSES)
    found, wanted = (
        torch.autograd.grad(sum((g * w.detach()).sum() for g, w in zip(gs, weights, strict=True)), z)
        for gs in (gradients, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


class Scaled(nn.CrossEntropyLoss):
    """Not the plain one."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(logits, target)


@pytest.mark.parametrize(
    "options",
    [
        {"detach": False},
        {"hard": nn.CrossEntropyLoss(label_smoothing=0.1)},
        {"hard": nn.CrossEntropyLoss(weight=torch.ones(CLASSES, dtype=torch.float64))},
        {"hard": nn.CrossEntropyLoss(ignore_index=3)},
        {"hard": Scaled()},
        {"hard": nn.functional.cross_entropy},
        {"beta": 1},
    ],
)
def test_other_losses_take_operators(options: dict[str, Any], used: list[bool]) -> None:
    loss, z, y = CollaborativeLoss(**options), some_logits(3, 4, CLASSES), indices(4)
    assert torch.equal(loss(z, y), by_operators(loss, z, y))
    assert not any(used)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            lambda loss, z, y: torch.func.grad(lambda a: loss([a, *z[1:]], y))(z[0].detach()), id="func.grad"
        ),
        pytest.param(lambda loss, z, y: torch.func.jvp(lambda a: loss([a, *z[1:]], y), (z[0],), (z[1],)), id="jvp"),
        pytest.param(lambda loss, z, y: loss([head.detach() for head in z], y), id="no gradient"),
        pytest.param(lambda loss, z, y: loss(z, z[0].detach().softmax(1).requires_grad_()), id="labels that learn"),
        pytest.param(
            lambda loss, z, y: torch.compile(loss, fullgraph=True, backend="aot_eager")(z, y), id="compiled"
        ),
    ],
)
def test_what_is_transformed_or_compiled_takes_operators(run: Callable[..., Any], used: list[bool]) -> None:
    run(CollaborativeLoss(), some_logits(3, 4, CLASSES), indices(4))
    assert not any(used)


@pytest.mark.parametrize("logits", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_soft_labels_of_any_type(logits: torch.dtype, labels: torch.dtype, used: list[bool]) -> None:
    z, y = some_logits(3, 4, CLASSES, dtype=logits), torch.rand(4, CLASSES).softmax(1).to(labels)
    found = CollaborativeLoss()(z, y)
    assert used == [True]
    expected = CollaborativeLoss()([head.double() for head in z], y.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert all(g.dtype == logits for g in torch.autograd.grad(found, z))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1.5), (torch.bfloat16, 2.0)])
def test_it_needs_little_memory_beside_the_logits(dtype: torch.dtype, most: float, used: list[bool]) -> None:
    z = [z.to(dtype).detach().requires_grad_() for z in some_logits(4, 512, 4_000)]
    size = sum(head.nbytes for head in z)
    with LiveBytes(z) as memory:
        CollaborativeLoss()(z, indices(512)).backward()
    assert used == [True]
    assert memory.peak - size <= most * size


def test_small_gradients_of_float16_are_there_for_a_gradient_scaler(used: list[bool]) -> None:
    z = some_logits(2, 512, 4_000, dtype=torch.float16)
    loss, y = CollaborativeLoss(), indices(512)
    found = torch.autograd.grad(loss(z, y) * 2**14, z)
    assert used == [True]
    expected = torch.autograd.grad(loss([head.float() for head in z], y) * 2**14, z)
    assert all((gradient != 0).double().mean() > 0.9 for gradient in found)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)


def test_heads_of_different_types() -> None:
    z = [
        z.to(dtype).detach().requires_grad_()
        for z, dtype in zip(some_logits(2, 4, CLASSES), (torch.float32, torch.float64), strict=True)
    ]
    gradients = torch.autograd.grad(CollaborativeLoss()(z, indices(4)), z)
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float64]
