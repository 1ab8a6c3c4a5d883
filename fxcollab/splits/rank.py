"""Options in the order in which they would be taken."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fxcollab.errors import PatternError
from fxcollab.splits.option import Option, OptionScore, evenness

TIE = 2 / 3
"""Options that reach this part of the best value tie with it: the ends of stages win, ..."""
LEAST = 1 / 5
"""... unless a level does less than this part of an even share of the work: it would be hardly a level."""


def rank(options: Iterable[Option], objective: OptionScore = evenness) -> dict[Option, float]:
    """Options with their values, best first: ends of stages among the ties, then by value, then shallow names.

    Of another objective than `evenness` only equals are ties.

    Raises:
        PatternError: the objective gives no number.
    """
    values = {option: _value(objective, option) for option in options}
    best = max(values.values(), default=0.0)
    ties = best * TIE if objective is evenness else math.inf

    def key(option: Option) -> tuple[bool, float, bool, int]:
        preferred = option.ends_stages and values[option] >= ties and is_balanced(option)
        depth = sum(name.count(".") for name in option.splits)
        return not preferred, -round(values[option], 6), not option.ends_stages, depth

    return {option: values[option] for option in sorted(values, key=key)}


def _value(objective: OptionScore, option: Option) -> float:
    value = objective(option)
    if not isinstance(value, int | float) or math.isnan(value):
        raise PatternError(
            f"The objective gives {value!r} for {', '.join(option.splits)}.",
            where=getattr(objective, "__qualname__", repr(objective)),
            why="options are ranked by it",
            hint="let it return a number: more is better",
        )
    return value


def is_balanced(option: Option) -> bool:
    """Whether every level does a fair part of the work."""
    return min(option.shares) >= LEAST / len(option.shares)
