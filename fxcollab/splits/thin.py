"""Of very many candidates, those that are worth combining."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from fxcollab.splits.candidates import Candidate

COMBINATIONS = 5000
"""How many options are looked at, at most."""


def thinned(candidates: Mapping[int, Candidate], levels: int) -> list[int]:
    """Places of so many candidates that their combinations can all be looked at, in order.

    Of candidates between which nothing lies that costs or learns, one stays: the end of a stage, the shallowest
    name, the last. If there are still too many, ends of stages stay, and of the others those that divide the work
    evenly.
    """
    alike: dict[tuple[int, int], int] = {}
    for place, candidate in candidates.items():
        key = candidate.flops[0], candidate.parameters[0]
        if key not in alike or _preferred(candidate) <= _preferred(candidates[alike[key]]):
            alike[key] = place
    most = _most(len(alike), levels)
    ends = [place for place in alike.values() if candidates[place].ends_stage]
    others = [place for place in alike.values() if not candidates[place].ends_stage]
    chosen = _spread(ends, candidates, most)
    return sorted([*chosen, *_spread(others, candidates, most - len(chosen))])


def _preferred(candidate: Candidate) -> tuple[bool, bool, int]:
    return not candidate.ends_stage, not candidate.is_module, candidate.name.count(".")


def _most(count: int, levels: int) -> int:
    while count > levels and math.comb(count, levels) > COMBINATIONS:
        count -= 1
    return count


def _spread(places: Sequence[int], candidates: Mapping[int, Candidate], count: int) -> list[int]:
    """At most ``count`` of the places, which are in order: those next to even parts of the work."""
    if len(places) <= count:
        return list(places)
    shares = [candidates[place].share for place in places]
    chosen: list[int] = []
    for part in range(1, count + 1):
        target, first = part / (count + 1), chosen[-1] + 1 if chosen else 0
        right = max(bisect_left(shares, target), first)
        last = len(places) - 1 - (count - part)  # enough are left for the parts that follow
        nearer_left = right > first and (right > last or target - shares[right - 1] <= shares[right] - target)
        chosen.append(min(right - 1 if nearer_left else right, last))
    return [places[index] for index in chosen]
