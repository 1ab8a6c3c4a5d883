"""The consensus of the other heads: the argument of q in section 3.2 of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.outputs import require_one_shape


def consensus(logits: Sequence[Tensor]) -> list[Tensor]:
    """For every head, the mean of the other heads' logits.

    Args:
        logits: one tensor per head, at least two, all of one shape.

    Returns:
        One tensor per head, shaped like the logits. Gradient flows through it to the other heads: detach the
        logits to stop it.

    Raises:
        ObjectiveError: there are fewer than two heads, or their shapes differ.
    """
    require_peers(logits)
    require_one_shape(logits)
    return [total / (len(logits) - 1) for total in sums_of_others(logits)]


def sums_of_others(logits: Sequence[Tensor]) -> Iterator[Tensor]:
    """For every head, in order, the sum over all others; there are at least two.

    Partial sums are shared, so that the cost is linear in the number of heads; nothing is subtracted, so that no
    digits are lost to a large head.
    """
    behind = list(accumulate(reversed(logits[1:]), torch.add))[::-1]  # behind[h] is the sum of those behind head h
    yield behind[0]
    before = logits[0]
    for z, rest in zip(logits[1:-1], behind[1:], strict=True):
        yield before + rest
        before = before + z
    yield before


def require_peers(logits: Sequence[Tensor]) -> None:
    """Raise an `ObjectiveError` for a single head."""
    if len(logits) < 2:
        raise ObjectiveError(
            f"A consensus needs at least 2 heads, not {len(logits)}.",
            why="Each head learns from the others.",
            hint="Train with more heads, or on the labels alone: CollaborativeLoss(beta=1).",
        )
