"""Ways to split a model that may be chosen, how good they are, and in which order they are taken."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise, product
from typing import TypeAlias

from fxcollab.arguments import checked
from fxcollab.errors import PatternError
from fxcollab.splits.candidates import Candidate
from fxcollab.tree import Fanout, HeadTree, ladder

COMBINATIONS = 5000
"""How many options are compared, at most."""
TIE = 2 / 3
"""Options that reach this part of the best value tie with it: the ends of stages win."""
LEAST = 1 / 5
"""What does less than this part of an even share of the work is hardly a level."""


@dataclass(frozen=True)
class Option:
    """Splits for a given head tree.

    Attributes:
        cuts: the candidates, along the data flow.
        fanouts: how many branches each makes.
        time: FLOPs of a training step, as a ratio to the original's.
    """

    cuts: tuple[Candidate, ...]
    fanouts: tuple[Fanout, ...]
    time: float

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits' names."""
        return tuple(cut.name for cut in self.cuts)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The part of one head's forward operations that lies on each level, the trunk first; 1 in all."""
        edges = (0.0, *(cut.share for cut in self.cuts), 1.0)
        return tuple(deep - shallow for shallow, deep in pairwise(edges))

    @cached_property
    def heads(self) -> int:
        """The number of heads."""
        return branches_of(self.fanouts)[-1]

    @property
    def ends_stages(self) -> bool:
        """Whether a stage ends at every cut."""
        return all(cut.ends_stage for cut in self.cuts)

    @property
    def is_balanced(self) -> bool:
        """Whether every level does some work."""
        return min(self.shares) >= LEAST / len(self.shares)

    @property
    def is_narrow(self) -> bool:
        """Whether one value crosses every cut."""
        return all(cut.is_narrow for cut in self.cuts)


@cache
def branches_of(fanouts: tuple[Fanout, ...]) -> tuple[int, ...]:
    """How many branches each level of a tree with these fan-outs has, the trunk's first."""
    tree = HeadTree((), fanouts)
    return tuple(tree.branches(level) for level in range(tree.depth + 1))


def _trees() -> Iterator[tuple[Fanout, ...]]:
    for splits in range(1, _AUTO_SPLITS + 1):
        even = product(range(2, _AUTO_HEADS + 1), repeat=splits)
        yield from (fanouts for fanouts in even if math.prod(fanouts) <= _AUTO_HEADS)
        if splits > 1:
            yield ladder([""] * splits).fanouts


_AUTO_HEADS, _AUTO_SPLITS = 8, 3
TREES = tuple(_trees())
"""The fan-outs from which ``auto`` takes some: even trees and ladders."""

OptionScore: TypeAlias = Callable[[Option], float]
"""How good an option is; more is better."""


@checked
def evenness(option: Option) -> float:
    """How evenly a head's work lies on the levels: ``exp`` of the shares' entropy, from 1 to the number of levels.

    The paper finds (section 4) that sharing in a hierarchy beats sharing at one point, and that heads need room to
    differ: the earlier a split, the more diverse the heads, and the dearer. A level with little work is hardly a
    level; where all do the same work, the tree makes most of its depth, and neither sharing nor diversity is bought
    at the expense of the other. Of ResNet-50's ends of stages this is highest at the paper's ``layer2`` and
    ``layer3``, of its CIFAR networks after the first and the second block.

    Args:
        option: splits for a head tree; the work is that of a forward.
    """
    return math.exp(-sum(share * math.log(share) for share in option.shares if share > 0))


def rank(options: Iterable[Option], objective: OptionScore = evenness) -> dict[Option, float]:
    """Options with their values, best first: ends of stages among the ties, then cuts at one value, then by value.

    Options with a level that does hardly any work come last. With an objective other than `evenness` they don't, and
    only equal values are ties.

    Raises:
        PatternError: the objective doesn't return a number.
    """
    values = {option: _value(objective, option) for option in options}
    best = max(values.values(), default=0.0)
    ties = best * TIE if objective is evenness else math.inf

    def key(option: Option) -> tuple[bool, bool, bool, float, int, bool, int]:
        is_last = objective is evenness and not option.is_balanced
        stages, narrow = (each and values[option] >= ties for each in (option.ends_stages, option.is_narrow))
        depth = sum(name.count(".") for name in option.splits)
        return (
            is_last,
            not stages,
            not narrow,
            -round(values[option], 6),
            -option.heads,
            not option.ends_stages,
            depth,
        )

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


def thinned(candidates: Mapping[int, Candidate], levels: int) -> list[int]:
    """Places of so many candidates that all their combinations can be compared, in order.

    Of candidates between which there are no operations and no parameters, one stays: the end of a stage, the
    shallowest name, the last. If there are still too many, ends of stages stay, and of the others those that divide
    the work evenly.
    """
    alike: dict[tuple[int, int], int] = {}
    for place, candidate in candidates.items():
        key = candidate.flops[0], candidate.parameters[0]
        if key not in alike or _preference(candidate) <= _preference(candidates[alike[key]]):
            alike[key] = place
    most = len(alike)
    while most > levels and math.comb(most, levels) > COMBINATIONS:
        most -= 1
    ends = [place for place in alike.values() if candidates[place].ends_stage]
    others = [place for place in alike.values() if not candidates[place].ends_stage]
    chosen = _evenly(ends, candidates, most)
    return sorted([*chosen, *_evenly(others, candidates, most - len(chosen))])


def _preference(candidate: Candidate) -> tuple[bool, bool, int]:
    return not candidate.ends_stage, not candidate.is_module, candidate.name.count(".")


def _evenly(places: Sequence[int], candidates: Mapping[int, Candidate], count: int) -> Sequence[int]:
    """At most ``count`` of the places, which are in order: those next to even parts of the work."""
    if len(places) <= count:
        return places
    shares = [candidates[place].share for place in places]
    chosen: list[int] = []
    for part in range(1, count + 1):
        target, first = part / (count + 1), chosen[-1] + 1 if chosen else 0
        index = bisect_left(shares, target, first, len(places) - 1 - (count - part))  # enough are left for the rest
        if index > first and target - shares[index - 1] <= shares[index] - target:
            index -= 1
        chosen.append(index)
    return [places[index] for index in chosen]
