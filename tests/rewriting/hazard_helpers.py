"""Inputs and the whole proof for small networks that are a hazard each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2))
SEQUENCE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
TOKENS = torch.tensor([[0, 3, 1], [6, 2, 3]])


def proven(
    model: nn.Module, splits: Sequence[str], inputs: Any = (X,), pattern: Any = "hierarchical", **options: Any
) -> CollabGraphModule:
    """The training model, after every line of the proof was seen to hold."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no module initialises")
        train_model = fxcollab.transform(model, pattern, splits, example_inputs=inputs, seed=0, **options)
    fxcollab.verify(model, train_model, inputs).raise_if_failed()
    return train_model


def copies(train_model: CollabGraphModule) -> int:
    return sum(node.target is fxcollab.private_copy for node in train_model.graph.nodes)


def rescales(train_model: CollabGraphModule) -> list[float]:
    return [node.args[1] for node in train_model.graph.nodes if node.target is fxcollab.rescale]


class Stem(nn.Module):
    """A stem, something behind it, a classifier."""

    def __init__(self, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.behind, self.head = nn.Linear(4, 4), behind or nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self.stem(x)))


class Skips(nn.Module):
    """``a`` is used at every level, ``b`` at two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a) + x
        c = self.c(b).tanh() + a
        return self.d(c + b) * a
