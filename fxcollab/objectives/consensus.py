"""What the other heads think together: the argument of q in section 3.2 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.outputs import require_one_shape


def consensus(logits: Sequence[Tensor]) -> list[Tensor]:
    """For every head, the mean of the other heads' logits.

    The logits are summed once, so that the cost grows linearly with the number of heads.

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
    whole, others = sum(logits[1:], start=logits[0]), len(logits) - 1
    return [(whole - z) / others for z in logits]


def require_peers(logits: Sequence[Tensor]) -> None:
    """Refuse a head that is alone.

    Raises:
        ObjectiveError: there are fewer than two heads.
    """
    if len(logits) < 2:
        raise ObjectiveError(
            f"A consensus takes at least 2 heads, not {len(logits)}.",
            why="Each head learns from the others.",
            hint="Train with more heads, or on the labels alone: CollaborativeLoss(beta=1).",
        )
