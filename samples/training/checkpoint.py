"""Checkpoints of a run: written whole or not at all, read without running code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save(file: Path, epoch: int, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """What ``restore`` needs after so many epochs; an interrupted call leaves the old file."""
    state = {
        "epoch": epoch,
        "modules": [module.state_dict() for module in modules],
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    torch.save(state, beside)
    beside.replace(file)


def restore(file: Path, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Put a run back where it was; returns how many epochs are done, 0 where there is no file."""
    if not file.exists():
        return 0
    state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    for module, values in zip(modules, state["modules"], strict=True):
        module.load_state_dict(values)
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return int(state["epoch"])
