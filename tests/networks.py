"""Networks that are a hazard to more than one way of running branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TrunkGoesOn(nn.Module):
    """The trunk calls a module with statistics after what lies behind the split has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.norm = nn.Linear(768, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        y = self.norm(torch.tanh(self.first(x)))
        return self.last(y + self.norm(x))
