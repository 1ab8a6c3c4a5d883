"""Methods that concern a tensor's gradient, such as hooks, and what returns its input under ``no_grad``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from tests.rewriting.hazard_helpers import X, proven

Hook = Callable[[Tensor], Tensor]


def scaled(factor: float) -> Hook:
    return lambda gradient: gradient * factor


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)


class InALoop(Hooked):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for factor in (2.0, 3.0):
            h.register_hook(lambda gradient, factor=factor: gradient * factor)
        return self.c(self.b(h))


class OneBeforeOneBehind(Hooked):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.register_hook(scaled(0.1))
        y = self.b(h)
        y.register_hook(scaled(10.0))
        return self.c(y)


class ByMode(Hooked):
    def forward(self, x: Tensor) -> Tensor:
        h, factor = self.a(x), 0.5 if self.training else 1.0
        h.register_hook(lambda gradient: gradient * factor)
        return self.c(self.b(h))


class Dropped(InALoop):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    value.sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("net", [InALoop, OneBeforeOneBehind, ByMode, Dropped])
@pytest.mark.parametrize("training", [True, False])
def test_hooks_with_the_same_code_stay_apart(net: type[Hooked], training: bool) -> None:
    model = net()
    train_model = proven(model, ["b"])
    pruned = fxcollab.prune(train_model)
    for each in (model, train_model, pruned):
        each.train(training)
    torch.manual_seed(0)
    expected = gradients(model, model(X))
    torch.manual_seed(0)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(pruned, pruned(X)).items())
    if not training:
        found = gradients(train_model, train_model(X))
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


class Kept(Hooked):
    """Hooks that are methods, partials, recursive, or hold lists; one holds a name that has no value in this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def note(self, gradient: Tensor) -> None:
        self.seen.append(gradient)

    def forward(self, x: Tensor) -> Tensor:
        h, factors = self.a(x), [2.0]

        def again(gradient: Tensor, left: int = 2) -> Tensor:
            return again(gradient * factors[0], left - 1) if left else gradient

        if not self.training:
            late = 1.0
        h.register_hook(self.note)
        h.register_hook(again)
        h.register_hook(partial(torch.mul, 3.0))
        h.register_hook(lambda gradient: gradient if self.training else gradient * late)
        return self.c(self.b(h))


def test_hooks_of_any_kind_are_the_same_in_both_traces() -> None:
    model = Kept()
    train_model = proven(model, ["b"])
    expected = gradients(model, model(X))
    pruned = fxcollab.prune(train_model)
    found = gradients(pruned, pruned(X))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_hook_that_holds_a_value_of_the_forward_is_refused() -> None:
    class Holds(Hooked):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            scale = h.sum()
            h.register_hook(lambda gradient: gradient * scale)
            return self.c(self.b(h))

    with pytest.raises(fxcollab.ForwardError, match="holds values that the forward computes"):
        fxcollab.transform(Holds(), splits=["b"])


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def test_the_proof_compares_gradients_of_the_generated_code() -> None:
    for net in (InALoop, Dropped):
        train_model = proven(net(), ["b"])
        forward = type(train_model).forward

        def lower(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            heads = forward(self, *args, **kwargs)
            return tuple(map(Halved.apply, heads)) if self.training else heads

        type(train_model).forward = lower  # type: ignore[method-assign]
        checks = fxcollab.verify(fxcollab.original(train_model), train_model, (X,)).checks
        assert [check.name for check in checks if not check.ok] == ["gradients are the mean over separate originals"]


RETURNS_ITS_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda h: h.contiguous(),
    "positive": lambda h: +h,
    "real": lambda h: h.real,
    "atleast_1d": torch.atleast_1d,
    "resolve_conj": lambda h: h.resolve_conj(),
    "flatten": lambda h: h.flatten(1),
    "to": lambda h: h.to(h.dtype),
    "chain": lambda h: (+h).contiguous().real,
    "in a tuple": lambda h: torch.broadcast_tensors(+h, h)[0],
    "a view": lambda h: h[:, :4],
    "a product": lambda h: h * 2,
    "in place": lambda h: (h * 2).add_(1),
    "a number of it": lambda h: h * h.shape[1],
    "after it was copied": lambda h: torch.empty(3, 4).copy_(h) + h.norm(),
    "after out": lambda h: torch.mul(h, 2, out=torch.empty(3, 4)) + h.norm(),
    "set in a clone": lambda h: set_to_zero(h.clone()),
    "set in itself": lambda h: set_to_zero(h),
    "set to it": lambda h: set_to(torch.zeros(3, 4), h),
}


def set_to_zero(value: Tensor) -> Tensor:
    value[:, 0] = 0.0
    return value


def set_to(value: Tensor, other: Tensor) -> Tensor:
    value[:] = other
    return value


@pytest.mark.parametrize("name", RETURNS_ITS_INPUT)
def test_under_no_grad_what_is_the_input_itself_has_its_gradient(name: str) -> None:
    class Returns(Hooked):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            with torch.no_grad():
                y = RETURNS_ITS_INPUT[name](h)
            return self.c(self.b(y))

    model = Returns()
    expected = gradients(model, model(X))
    pruned = fxcollab.prune(proven(model, ["b"]))
    found = gradients(pruned, pruned(X))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
