"""Small networks that are cut, and the levels of their nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.patterns import head_tree


class Chain(nn.Module):
    """x -> stem -> layer1 -> layer2 -> fc, all of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layer1 = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))))


class Parallel(Chain):
    """Two paths beside each other, and what is off the path to the output or never called."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.aside(x)
        return self.fc(self.layer1(x) * self.layer2(x))


class Reuse(nn.Module):
    """One module called three times; an alias of another."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.mix, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.alias = self.mix

    def forward(self, x: Tensor) -> Tensor:
        x = self.cell(x)
        x = self.mix(x).relu()
        x = self.cell(x).sin()
        return self.fc(self.cell(x))


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.shift = nn.Parameter(torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        a = self.a(x) * self.scale
        b = self.b(a)
        c = self.c(b + x) + a
        weight = self.shift.sigmoid()
        return self.d(c * weight) + b


def cut(model: nn.Module, splits: Sequence[str], granularity: Any = "auto") -> tuple[fxcollab.CollabGraphModule, Any]:
    captured = fxcollab.capture(model, splits, granularity=granularity)
    return captured, fxcollab.partition(captured, head_tree("hierarchical", splits))


def levels(model: nn.Module, *splits: str, granularity: Any = "auto") -> dict[str, int]:
    captured, found = cut(model, splits, granularity)
    return {node.name: level for node, level in found.nodes[captured.graph].items()}
