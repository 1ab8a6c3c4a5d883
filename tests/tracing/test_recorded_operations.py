"""What stays an operation of the graph, and is done at every call."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CaptureError
from tests.tracing.capture_helpers import Net, X, names, run, same


def test_random_and_range_stay_operations() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) + torch.rand(4) * torch.randn(x.shape) + torch.arange(x.shape[1])
            return self.head(x * torch.bernoulli(torch.full((4,), 0.5)))

    model = Draws()
    captured = fxcollab.capture(model, ["stem"])
    assert {"rand", "randn", "arange", "full", "bernoulli"} <= set(names(captured.graph))
    for seed in (1, 2):
        assert same(run(captured, seed), run(model, seed))
    assert not same(run(captured, 1), run(captured, 2))


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_buffers_are_counted_at_every_call(granularity: Any) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("added", torch.zeros(()))
            self.register_buffer("plus", torch.zeros(()))
            self.register_buffer("item", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.added.add_(1)
            self.plus += 2
            self.item[0] = self.plus
            return self.head(self.stem(x))

    model = Counts()
    captured = fxcollab.capture(model, ["stem"], granularity=granularity)
    for _ in range(3):
        captured(X)
    assert (model.added.item(), model.plus.item(), model.item.tolist()) == (3, 6, [6, 0])


def test_an_alias_sees_what_is_written_in_place() -> None:
    class Alias(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            alias = x
            x += 1
            x[:, 0] = 5
            return self.head(alias)

    model = Alias()
    captured = fxcollab.capture(model, ["stem"])
    assert torch.equal(captured(X), model(X))


def test_plain_numbers_are_not_rebound_by_inplace_operators() -> None:
    class Sizes(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            size = x.shape[0]
            more = size
            more += 1
            return self.head(x) * more + size

    model = Sizes()
    captured = fxcollab.capture(model, ["stem"])
    assert torch.equal(captured(X), model(X))


def test_no_grad_is_kept() -> None:
    class NoGrad(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.stem(x)
                scale = self.body[0].first.weight.mean()
            return self.head(self.body(x) * scale)

    model = NoGrad()
    captured = fxcollab.capture(model, ["stem"])
    captured(X).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(X).sum().backward()
    for name, p in model.named_parameters():
        assert (found[name] is None) == (p.grad is None), name
        assert p.grad is None or torch.equal(found[name], p.grad)
    assert found["stem.weight"] is None


class Twice(torch.autograd.Function):
    """Its backward isn't that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class Custom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Twice.apply(self.stem(x)))


def test_a_custom_function_keeps_its_backward() -> None:
    model = Custom()
    captured = fxcollab.capture(model, ["stem"])
    (found,) = torch.autograd.grad(captured(X).sum(), [model.stem.weight])
    (expected,) = torch.autograd.grad(model(X).sum(), [model.stem.weight])
    assert torch.equal(found, expected)
    copied = pickle.loads(pickle.dumps(captured))
    (found,) = torch.autograd.grad(copied(X).sum(), [copied.stem.weight])
    assert torch.equal(found, expected)


def test_a_switched_autocast_is_refused() -> None:
    class Autocast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.stem(x)
            return self.head(x.float())

    with pytest.raises(CaptureError, match="autocast is entered inside the forward"):
        fxcollab.capture(Autocast(), ["stem"])
