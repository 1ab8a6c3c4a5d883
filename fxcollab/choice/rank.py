"""Options in the order in which they would be taken."""

from __future__ import annotations

from collections.abc import Iterable

from fxcollab.choice.option import Objective, Option

TIE = 2 / 3
"""Options that reach this part of the best value tie with it: the ends of stages win, ..."""
LEAST = 1 / 5
"""... unless a level does less than this part of an even share of the work: it would be hardly a level."""


def rank(options: Iterable[Option], objective: Objective) -> dict[Option, float]:
    """Options with their values, best first: ends of stages among the ties, then by value, then shallow names."""
    values = {option: float(objective(option)) for option in options}
    best = max(values.values(), default=0.0)
    ties = best - (1 - TIE) * abs(best)

    def key(option: Option) -> tuple[bool, float, int]:
        preferred = option.ends_stages and values[option] >= ties and is_balanced(option)
        return not preferred, -round(values[option], 6), sum(name.count(".") for name in option.splits)

    return {option: values[option] for option in sorted(values, key=key)}


def is_balanced(option: Option) -> bool:
    """Whether every level does a fair part of the work."""
    return min(option.shares) >= LEAST / len(option.shares)
