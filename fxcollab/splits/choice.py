"""A choice of splits, explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fxcollab.costs.costs import Costs
from fxcollab.splits.option import Option, OptionScore
from fxcollab.tracing.interface import ExampleInputs

SHOWN = 3


@dataclass(frozen=True)
class RunnerUp:
    """An option that was not taken, its value by the objective, and why."""

    option: Option
    value: float
    why: str


@dataclass(frozen=True)
class Choice:
    """Splits that were chosen.

    Attributes:
        option: what was chosen.
        value: its value by the objective.
        reason: why, in a line.
        costs: of a training step, against the original's: the numbers that `summarise` finds.
        runners_up: the best that is over the budget, and the options that come next.
        example_inputs: those for which it was made; `transform` takes them, too. None for a usual input.
    """

    option: Option
    value: float
    reason: str
    costs: Costs
    runners_up: tuple[RunnerUp, ...]
    example_inputs: ExampleInputs | None = field(default=None, repr=False, compare=False)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits' names, along the data flow."""
        return self.option.splits

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; of the candidates their names."""
        return {
            **_option_to_json(self.option, self.value, self.reason),
            "costs": self.costs.to_json(),
            "runners_up": [_option_to_json(other.option, other.value, other.why) for other in self.runners_up],
        }


def _option_to_json(option: Option, value: float, why: str) -> dict[str, Any]:
    return {
        "splits": option.splits,
        "fanouts": option.fanouts,
        "shares": option.shares,
        "time": option.time,
        "value": value,
        "why": why,
    }


def reason_for(option: Option, ranked: Mapping[Option, float], objective: OptionScore) -> str:
    """Why ``option`` is taken of those that keep the budget: where it cuts, and what each level does."""
    shares = f"levels do {_percentages(option.shares)} of the work"
    value = _value(ranked[option], objective)
    if option.ends_stages:
        place = "each cut ends a stage" if len(option.cuts) > 1 else "a stage ends there"
        best = max(ranked, key=lambda other: ranked[other])
        inside = "" if best.ends_stages else f", {ranked[best]:.2f} inside stages at {listed(best.splits)}"
        return f"{place}; {shares} ({value}{inside})"
    ends = max((other for other in ranked if other.ends_stages), key=lambda other: ranked[other], default=None)
    if ends is None:
        return f"{shares} ({value}); there are too few ends of stages to choose"
    others = f"{_percentages(ends.shares)} ({ranked[ends]:.2f})"
    return f"{shares} ({value}); the best ends of stages, {listed(ends.splits)}, would give {others}"


def crossing_at(option: Option) -> str:
    """How many values cross each cut, and what they weigh; nothing for cuts at one value."""
    wide = [cut for cut in option.cuts if not cut.is_narrow]
    places = [f"{cut.crossing[0]} at {cut.name} ({cut.crossing[1] / 1e6:.1f} MB)" for cut in wide]
    return f"; several values cross: {listed(places)}" if wide else ""


def runners_up(
    chosen: Option, ranked: Mapping[Option, float], over: Mapping[Option, str], objective: OptionScore
) -> Iterator[RunnerUp]:
    """The best that is over the budget, and those that come next."""
    for option in list(over)[:1]:
        yield RunnerUp(option, objective(option), _tree(option, chosen) + over[option])
    for option in islice((option for option in ranked if option != chosen), SHOWN):
        why = _value(ranked[option], objective)
        if chosen.ends_stages and not option.ends_stages:
            why += f", but no stage ends at {listed([cut.name for cut in option.cuts if not cut.ends_stage])}"
        elif chosen.is_narrow and not option.is_narrow:
            why += f", but several values cross at {listed([cut.name for cut in option.cuts if not cut.is_narrow])}"
        elif not option.is_balanced:
            why += f", but levels do {_percentages(option.shares)} of the work"
        elif round(ranked[option], 6) == round(ranked[chosen], 6):
            why = "as good, under deeper names"
        yield RunnerUp(option, ranked[option], _tree(option, chosen) + why)


def _tree(option: Option, chosen: Option) -> str:
    """The fan-outs of an option for another tree than the chosen one."""
    return "" if option.fanouts == chosen.fanouts else f"fan-outs {option.fanouts}: "


def _value(value: float, objective: OptionScore) -> str:
    return f"{getattr(objective, '__name__', type(objective).__name__)} {value:.2f}"


def _percentages(shares: Sequence[float]) -> str:
    """``45 %, 35 % and 20 %``."""
    return listed([f"{share:.0%}".replace("%", " %") for share in shares])


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])
