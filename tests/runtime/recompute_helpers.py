"""The same training model, plain and with branches that are computed again, and a step of it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab

X, LABELS = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
TREES: dict[str, dict[str, Any]] = {
    "hierarchical": {"splits": ["layer1", "layer2"]},
    "fan-outs": {"splits": ["layer1", "layer2"], "fanouts": (3, 2)},
    "simple": {"pattern": "simple", "splits": ["layer1"], "heads": 4},
    "instances": {"pattern": "multi-instance", "heads": 3},
}


def pair(
    factory: Callable[[], nn.Module], **options: Any
) -> tuple[fxcollab.CollabGraphModule, fxcollab.CollabGraphModule]:
    """The same training model, plain and with branches that are computed again."""
    torch.manual_seed(0)
    model = factory()
    plain = fxcollab.transform(model, seed=1, **options)
    again = fxcollab.transform(copy.deepcopy(model), seed=1, recompute="heads", **options)
    again.load_state_dict(plain.state_dict())
    return plain, again


def loss_of(outputs: Any) -> Tensor:
    return torch.stack([F.cross_entropy(output, LABELS) for output in outputs]).sum()


def step(model: nn.Module, x: Tensor = X, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of a step, and the buffers after it."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss_of(model(x)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@contextmanager
def nothing_computed_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same statements in the same order, each branch called as it is."""
    with monkeypatch.context() as patch:
        module = importlib.import_module("fxcollab.runtime.recompute")
        patch.setattr(module, "checkpoint", lambda branch, *inputs, **options: branch(*inputs))
        yield


class Dropping(nn.Module):
    """Random numbers in the trunk and behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(768, 8), nn.Linear(8, 8)
        self.third = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.first(x.flatten(1))), 0.3, self.training)
        x = F.dropout(torch.tanh(self.second(x)), 0.4, self.training)
        return self.third(x * torch.rand_like(x))


class Remembering(nn.Module):
    """Reads a buffer that it then writes, and assigns another anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc(x)) * self.scale.clone()
        self.scale.mul_(0.5)
        self.calls = self.calls + 1
        return y * self.calls


class RememberingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.memory, self.last = nn.Linear(768, 8), Remembering(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(self.first(x.flatten(1))))
