"""Networks with much state, and training models of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from tests.references import SmallConvNet

CHAIN = {"splits": ["layer1", "layer2"]}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class Hoarder(nn.Module):
    """Has all the state that plain fx drops or renames."""

    scale: Tensor
    table: Tensor
    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))
        self.unused_gain = nn.Parameter(torch.rand(2))
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("table", torch.rand(3), persistent=False)
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.stem = nn.Linear(4, 4)
        self.unused = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.body = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.alias = self.body["a"]
        self.norm = nn.BatchNorm1d(4)
        self.nothing = None
        self.register_parameter("absent", None)
        self.head = nn.Linear(4, 3)
        self.twin = nn.Linear(4, 3)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x * self.gain) + self.scale
        x = self.norm(self.body["b"](self.alias(x)))
        return self.head(x) + self.twin(x) * self.table


def mlp(**options: Any) -> tuple[Mlp, fxcollab.CollabGraphModule]:
    torch.manual_seed(0)
    model = Mlp()
    return model, fxcollab.transform(model, **{"splits": ["first", "second"], "seed": 1, **options})


def hoarder() -> tuple[Hoarder, fxcollab.CollabGraphModule]:
    torch.manual_seed(0)
    model = Hoarder()
    return model, fxcollab.transform(model, "simple", ["body.b"], heads=3, seed=1)


def chain(**options: Any) -> tuple[SmallConvNet, fxcollab.CollabGraphModule]:
    torch.manual_seed(0)
    model = SmallConvNet()
    return model, fxcollab.transform(model, **{**CHAIN, "seed": 1, **options})


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def one_step(train_model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(train_model.parameters(), lr=0.1)
    sum(output.square().sum() for output in train_model(x)).backward()
    optimizer.step()
    optimizer.zero_grad()
