"""Small networks and graph summaries for tests of capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


def operations(graph: fx.Graph) -> list[tuple[str, str]]:
    """Op and target of every node that is neither input nor output."""
    return [(n.op, str(n.target)) for n in graph.nodes if n.op not in ("placeholder", "output")]


def names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x))) + x


class Net(nn.Module):
    """Three stages; the middle one is nested twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


X = torch.linspace(-1, 1, 8).reshape(2, 4)


class AuxNet(nn.Module):
    """Another structure, other state and another output in train mode, as with auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        if self.training:
            return self.head(F.dropout(x, 0.5, self.training)), self.aux(x)
        return self.head(x)


def run(module: Callable[[Tensor], Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return module(X)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return isinstance(other, Tensor) and torch.equal(one, other)


def follows_the_mode(module: nn.Module, model: nn.Module) -> bool:
    """In either mode, twice each, ``module`` returns what ``model`` does."""
    for training in (True, False, True, False):
        module.train(training)
        model.train(training)
        if not same(run(model), run(module)):
            return False
    return True
