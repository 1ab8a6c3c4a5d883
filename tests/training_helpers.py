"""Data, steps and gradients for tests that train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxcollab
from fxcollab.codegen.branches import Recompute

CLASSES = 5


class Mlp(nn.Module):
    """No BatchNorm, so that the mean over two half batches is the mean over the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images whose class can be told from their colours."""
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(10) % CLASSES
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    noise = torch.randn(10, 3, 8, 8, generator=generator)
    return (2 * colours[target] + 0.3 * noise).to(dtype), target


def train(
    model: Callable[..., Any],
    parameters: Any,
    steps: int = 8,
    data: tuple[Tensor, Tensor] | None = None,
    each: Callable[[], Any] = lambda: None,
) -> list[float]:
    """The losses of some steps."""
    x, target = data or batch()
    loss = fxcollab.CollaborativeLoss()
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss(model(x), target)
        total.backward()
        optimizer.step()
        each()
        losses.append(total.item())
    return losses


def gradients(
    model: Callable[..., Any], owner: nn.Module, data: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The gradients of one step, under the parameters' names in ``owner``."""
    x, target = data or batch(next(owner.parameters()).dtype)
    owner.zero_grad()
    fxcollab.CollaborativeLoss()(model(x), target).backward()
    found = {name: p.grad.clone() for name, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    largest = max(float(g.abs().max()) for g in expected.values())
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12 * largest, msg=name)


def mlp(recompute: Recompute | None = None) -> fxcollab.CollabGraphModule:
    torch.manual_seed(0)
    model = Mlp().double()
    return fxcollab.transform(model, splits=["first", "second"], fanouts=(2, 3), seed=1, recompute=recompute)


def mlp_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 6, dtype=torch.float64, generator=generator), torch.arange(8) % CLASSES
