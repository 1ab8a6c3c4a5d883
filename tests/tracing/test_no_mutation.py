"""Capturing leaves the model, random state and gradient mode as they are."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CaptureError
from tests.speeds import slow_but
from tests.tracing.capture_helpers import Net, X, run, same


class Untidy(nn.Module):
    """Its forward sets, counts, fills and registers whatever it can."""

    calls_of_all = 0
    seen: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.inner = Net()
        self.calls, self.last, self.maps, self.cache = 0, None, [], {"kept": 1}
        self.constant = torch.ones(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.head.register_forward_hook(lambda module, inputs, output: output)
        self.head.bias.requires_grad_(False)
        self.inner.eval()

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls_of_all += 1
        self.calls += 1
        self.count.add_(1)
        self.steps += 1
        x = self.stem(x)
        self.last = x
        self.maps.append(x)
        self.cache["x"] = x
        self.new_attribute = x
        self.constant = self.constant + x
        self.stem.seen = x
        self.register_buffer("late", torch.zeros(2))
        x = self.inner.body(self.inner.stem(x))
        return self.head(x + torch.tensor([1.0, 2.0, 3.0, 4.0]))


class Failing(Untidy):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if x.sum() > 0 else -x


def everything(model: nn.Module) -> dict[str, Any]:
    """All that can be told of a model: attributes, contents, identities, flags, hooks, classes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            found[f"{path}.{name}"] = (id(value), _content(value))
        for cls in type(module).__mro__[:-1]:
            found[f"class {cls.__qualname__}"] = {name: id(value) for name, value in vars(cls).items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[f"tensor {name}"] = (id(tensor), tensor._version, tensor.requires_grad, tensor.tolist())
    found["function"] = id(torch.autograd.Function.__dict__["apply"])
    return found


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: id(item) for key, item in value.items()}
    if isinstance(value, list | set):
        return [id(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value if isinstance(value, int) else None


@pytest.mark.parametrize("granularity", ["auto", "op"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("splits", slow_but([["inner.body.0.first"]], [["stem"], ["inner.body.0.first"]]))
def test_capturing_changes_nothing(splits: list[str], training: bool, granularity: Any) -> None:
    model = Untidy().train(training)
    model.inner.eval()
    before = everything(model)
    fxcollab.capture(model, splits, granularity=granularity)
    assert everything(model) == before


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_a_capture_that_fails_changes_nothing(granularity: Any) -> None:
    model = Failing()
    before = everything(model)
    with pytest.raises(CaptureError):
        fxcollab.capture(model, ["stem"], granularity=granularity)
    assert everything(model) == before


def test_capturing_leaves_the_random_state_and_the_gradient_mode() -> None:
    class Draws(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                noise = torch.rand(4)
            return super().forward(x + noise)

    model, state = Draws(), torch.get_rng_state()
    with torch.no_grad():
        fxcollab.capture(model, ["stem"])
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


_CONSTANT = torch.tensor([4.0, 3.0, 2.0, 1.0])


class Constant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + _CONSTANT)


def test_constants_stay_off_the_model() -> None:
    model = Constant()
    captured = fxcollab.capture(model, ["stem"])
    assert torch.equal(captured(X), model(X))
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]
    assert list(captured.state_dict()) == list(model.state_dict())
    assert same(run(pickle.loads(pickle.dumps(captured))), run(model))
