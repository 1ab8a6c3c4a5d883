"""Logits of language models, (N, T, V), and labels, (N, T), as a batch of N * T samples."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.outputs import described

Tokens: TypeAlias = Literal["aligned", "shifted"]


def flat_logits(z: Tensor) -> Tensor:
    """Logits (N * T, V) of (N, T, V).

    Raises:
        ObjectiveError: they have another number of dimensions.
    """
    if z.dim() != 3:
        raise ObjectiveError(
            f"Logits of tokens have the shape (N, T, V), this is {described(z)}.",
            hint="Leave out the option tokens for classes in dimension 1.",
        )
    return z.flatten(0, 1)


def flat_labels(target: Any, shape: tuple[int, ...], tokens: Tokens, ignored: int) -> Tensor:
    """Labels (N * T) of labels (N, T), or (N * T, V) of soft ones; nothing labels the last of shifted ones.

    Raises:
        ObjectiveError: they don't belong to N x T tokens, or are soft and to be shifted.
    """
    labels = isinstance(target, Tensor) and target.shape[:2] == shape
    soft = labels and target.dim() == 3
    if not labels or (soft and tokens == "shifted"):
        raise ObjectiveError(
            f"The target is {described(target)} and doesn't fit {shape[0]} x {shape[1]} tokens.",
            why="Soft labels can't be shifted." if soft else f"It must be token indices of shape {shape}.",
            hint="Shift logits and labels yourself and pass tokens='aligned'."
            if soft
            else "Pass the labels as the model's own loss takes them, padded like its inputs.",
        )
    if tokens == "shifted":
        target = target.long()  # bytes have no room for the ignored label
        target = F.pad(target[:, 1:], (0, 1), value=ignored)
    flat: Tensor = target.flatten(0, 1)
    return flat
