"""Checkpoints of a run: written whole or not at all, read without running code, and only by the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samples.training.lines import replacing


def save(
    file: Path,
    identity: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Keep a run; an interrupted call leaves the old file.

    Args:
        file: where to.
        identity: what makes the run this one: source, options, seed.
        history: what every epoch gave.
        modules: whose state is kept.
        optimizers: whose state is kept.
    """
    state = {
        "identity": dict(identity),
        "history": [dict(epoch) for epoch in history],
        "modules": [module.state_dict() for module in modules],
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as opened:
        torch.save(state, opened)


def restore(
    file: Path,
    identity: Mapping[str, Any],
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[dict[str, Any]]:
    """Put a run back where it was; returns what its epochs gave, nothing where there is no file.

    Raises:
        ValueError: the file is damaged, or of another run.
    """
    if not file.exists():
        return []
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
        kept, history = dict(state["identity"]), [dict(epoch) for epoch in state["history"]]
        parts = [*zip(modules, state["modules"], strict=True), *zip(optimizers, state["optimizers"], strict=True)]
    except Exception as error:  # whatever a damaged file makes torch raise
        raise _damaged(file, error) from error
    changed = [name for name in {**kept, **identity} if kept.get(name) != identity.get(name)]
    if changed:
        told = ", ".join(f"{name} was {kept.get(name)!r} and is {identity.get(name)!r}" for name in changed)
        raise ValueError(f"{file} is of another run: {told}; give the same options, or another directory")
    try:
        for part, values in parts:
            part.load_state_dict(values)
    except Exception as error:
        raise _damaged(file, error) from error
    return history


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged ({type(error).__name__}: {error}); delete it to begin anew")
