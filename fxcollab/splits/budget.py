"""Budgets: the most time and memory that a training step may take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fxcollab.costs.costs import StepCost
from fxcollab.errors import PatternError

Amount: TypeAlias = float | str
"""A ratio to a step of the original, 1.75 or ``"1.75x"``; of memory also a size, ``"20GB"`` or ``"16GiB"``."""

_AMOUNT = re.compile(r"\s*(\d*\.?\d+)\s*(?:x|([kmgt])(i?)b|)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """The most of something that a step may take: a ratio to the original's, or bytes."""

    name: Literal["time", "memory"]
    amount: float
    is_size: bool = False

    def ratio(self, original: StepCost, *, recomputes: bool) -> float:
        """The same as a ratio.

        Raises:
            PatternError: several heads always take more.
        """
        ratio = self.amount / original.memory if self.is_size else self.amount
        if ratio >= 1 or (recomputes and self.name == "memory" and ratio > 0):
            return ratio
        if self.is_size:
            enough = f"{1.5 * original.memory / 1e6:.3g}MB"
            raise PatternError(
                f"A budget of {self.amount / 1e6:.4g} MB of memory can't be kept.",
                why=f"a training step of the original model takes {original.memory / 1e6:.4g} MB on these inputs",
                hint=f"give more, such as max_memory={enough!r} (--max-memory {enough}), or a smaller batch",
            )
        raise PatternError(
            f"A budget of {self.amount:g}x the {self.name} can't be kept.",
            why="it is a ratio to the original model's, and several heads cost more than one",
            hint=f"give 1 or more: max_{self.name}=1.75 (--max-{self.name} 1.75x)",
        )


def limits_of(max_time: Amount | None, max_memory: Amount | None) -> Iterator[Limit]:
    """The limits that are given.

    Raises:
        PatternError: one can't be read.
    """
    if max_time is not None:
        yield _limit("time", max_time)
    if max_memory is not None:
        yield _limit("memory", max_memory)


def ratios(limits: Iterable[Limit], original: StepCost, recompute: object) -> dict[str, float]:
    """The limits by name, as ratios to a step of the original."""
    return {limit.name: limit.ratio(original, recomputes=recompute is not None) for limit in limits}


def _limit(name: Literal["time", "memory"], amount: Amount) -> Limit:
    if not isinstance(amount, str):
        return Limit(name, amount)
    found = _AMOUNT.fullmatch(amount)
    if found is None or (found[2] and name == "time"):
        size = " or a size (--max-memory 20GB)" if name == "memory" else ""
        raise PatternError(
            f"Budget {amount!r} can't be read.",
            hint=f"write a ratio to the original: max_{name}=1.75 (--max-{name} 1.75x){size}",
        )
    if not found[2]:
        return Limit(name, float(found[1]))
    power = "kmgt".index(found[2].lower()) + 1
    return Limit(name, float(found[1]) * (1024 if found[3] else 1000) ** power, is_size=True)
