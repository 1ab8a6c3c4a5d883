"""Choose splits: the best by an objective, within budgets of time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise
from operator import add

from torch import nn

from fxcollab.analysis.partition import partition
from fxcollab.costs.costs import Costs, costs_of, ratio
from fxcollab.costs.profile import profile
from fxcollab.costs.step import Placement, held_bytes, trained_bytes
from fxcollab.errors import PatternError, SplitError
from fxcollab.sources.loaded import model_of
from fxcollab.splits.budget import Budget
from fxcollab.splits.candidates import Survey, kept_bytes, survey
from fxcollab.splits.errors import another_value, could_not_cut, none_fits, too_few_cuts, uncounted, wrong_budget
from fxcollab.splits.explain import Choice, reason_for, runners_up
from fxcollab.splits.option import Option, OptionScore, evenness
from fxcollab.splits.rank import rank
from fxcollab.splits.thin import thinned
from fxcollab.tracing.capture import Granularity
from fxcollab.tracing.interface import ExampleInputs
from fxcollab.tree import Fanout, HeadTree, head_tree


def choose_splits(
    model: nn.Module | Callable[[], nn.Module],
    example_inputs: ExampleInputs | None = None,
    *,
    levels: int | None = None,
    fanouts: Sequence[Fanout] | None = None,
    max_time: float | None = None,
    max_memory: float | None = None,
    objective: OptionScore = evenness,
    measure: bool = False,
    optimizer: float = 1.0,
    granularity: Granularity = "auto",
    depth: int | None = None,
) -> Choice:
    """The splits for a head tree over ``model``, with the reason, the costs and the runners-up.

    Of all ways to cut at the candidates of `find_splits` that keep the budgets, the one that the objective values
    most is taken; but where cuts at the ends of stages reach two thirds of that value, and no level does less than a
    fifth of an even share of the work, the best of those. Of equals the one with shallower names is taken. With an
    objective of one's own only equals tie.

    Args:
        model: any module on any device, meta included, which stays as it is; or a factory of one.
        example_inputs: tuple or dict, as for `transform`; costs are those at their shapes.
        levels: how many splits; as many as fan-outs, or 2.
        fanouts: branches at each split; 2 each unless said.
        max_time: what a training step may take, as a ratio to the original's; FLOPs stand for time unless measured.
        max_memory: what the peak of a training step's memory may be, as a ratio to the original's.
        objective: how good an `Option` is; `evenness` unless said.
        measure: take the time of every node on this machine; the model needs values.
        optimizer: values that the optimizer holds for each trained one: 1 for SGD with momentum, 2 for Adam.
        granularity: as for `find_splits`.
        depth: as for `find_splits`.

    Raises:
        PatternError: a budget below 1, or levels and fan-outs that don't fit together.
        SplitError: no single value cuts the model, there are fewer cuts than levels, or no choice keeps the
            budgets; the hint says what there is.
        CaptureError: as for `find_splits`.
    """
    budget = _budget(max_time, max_memory)
    tree = _tree_of(levels, fanouts)
    model = model_of(model)
    found = survey(model, example_inputs, granularity, depth, measure)
    if not any(cost.forward_flops for cost in found.chain.costs.nodes.values()):
        raise uncounted(model)
    if len(found.candidates) < tree.depth:
        raise too_few_cuts(model, found, tree.depth)
    estimates = _Estimates(found, tree, optimizer)

    def costs(option: Option) -> Costs:
        captured, profiled = found.chain.captured, found.chain.costs
        if not found.searched.is_open:
            captured = found.searched.capture(option.splits)
            profiled = profile(captured, found.searched.interface)
        cut = partition(captured, HeadTree(option.splits, tree.fanouts))
        counted = costs_of(captured, Placement.of(captured, cut), profiled, optimizer)
        if counted.training.flops != estimates.flops(option):
            raise another_value(option)
        return estimates.timed(counted, option) if measure else counted

    return _Choosing(estimates, budget, objective, costs).choice()


def _tree_of(levels: int | None, fanouts: Sequence[Fanout] | None) -> HeadTree:
    """The head tree, with numbers for its splits."""
    if levels is None:
        levels = len(fanouts) if isinstance(fanouts, Sequence) else 2
    if levels < 1 or (isinstance(fanouts, Sequence) and len(fanouts) != levels):
        raise PatternError(
            f"There is no head tree of {levels} levels" + (f" with fan-outs {tuple(fanouts)}." if fanouts else "."),
            why="every level lies behind a split, which has one fan-out",
            hint="give levels=2, or fanouts=(2, 2)",
        )
    return head_tree("hierarchical", [str(level) for level in range(levels)], fanouts=fanouts)


def _budget(max_time: float | None, max_memory: float | None) -> Budget:
    for name, limit in (("time", max_time), ("memory", max_memory)):
        if limit is not None and not limit >= 1:
            raise wrong_budget(name, limit)
    return Budget(max_time or math.inf, max_memory or math.inf)


class _Estimates:
    """Options, with what is known of their costs before any of them is captured."""

    def __init__(self, found: Survey, tree: HeadTree, optimizer: float) -> None:
        self._found, self._tree, self._chain = found, tree, found.chain
        self._places = {candidate: place for place, candidate in found.candidates.items()}
        flops = self._chain.sums({node: cost.flops for node, cost in self._chain.costs.nodes.items()})
        self._flops = list(accumulate(flops))
        self._before = list(accumulate(self._chain.sums(found.seconds))) if found.seconds else self._flops
        held = self._chain.sums(held_bytes(self._chain.captured, optimizer), self._chain.state)
        kept = self._chain.sums(kept_bytes(self._chain.costs))
        gradients = self._chain.sums(trained_bytes(self._chain.captured), self._chain.state)
        self._at_start = list(accumulate(map(add, held, kept)))
        self._at_end = list(accumulate(map(add, held, gradients)))

    def options(self) -> Iterator[Option]:
        """All ways to cut in which every level learns, with their times."""
        for places in combinations(thinned(self._found.candidates, self._tree.depth), self._tree.depth):
            cuts = tuple(self._found.candidates[place] for place in places)
            if all(deep.parameters[0] > shallow.parameters[0] for shallow, deep in pairwise(cuts)):
                option = Option(cuts, self._tree.fanouts, 1.0)
                yield replace(option, time=self._over_levels(option, self._before) / self._before[-1])

    def timed(self, costs: Costs, option: Option) -> Costs:
        """With the seconds that were measured."""
        seconds = self._before[-1]
        return Costs(replace(costs.original, seconds=seconds), replace(costs.training, seconds=option.time * seconds))

    def flops(self, option: Option) -> int:
        """Of a training step: exactly those of the graph in which the cuts are where they are meant to be."""
        return round(self._over_levels(option, self._flops))

    def memory(self, option: Option) -> float:
        """About the ratio of the peaks: with what is kept as the backward starts, or with gradients as it ends."""
        peak = max(self._over_levels(option, self._at_start), self._over_levels(option, self._at_end))
        return ratio(peak, max(self._at_start[-1], self._at_end[-1]))

    def _over_levels(self, option: Option, before: Sequence[float]) -> float:
        """The sum over all instances, of sums up to each value of the chain."""
        branches = map(self._tree.branches, range(len(option.cuts) + 1))
        edges = pairwise((0.0, *(before[self._places[cut]] for cut in option.cuts), before[-1]))
        return sum(count * (deep - shallow) for count, (shallow, deep) in zip(branches, edges, strict=True))


NEAR = 1.1
"""By which factor estimates of memory may be off, set right by the last exact count."""
NEAREST = 8
"""Of so many options exact costs are counted, to tell which is the cheapest."""


@dataclass(frozen=True, eq=False)
class _Choosing:
    """The search: options, and what they cost as they would be captured."""

    estimates: _Estimates
    budget: Budget
    objective: OptionScore
    costs: Callable[[Option], Costs]

    def choice(self) -> Choice:
        """The first in rank that keeps the budget."""
        options = list(self.estimates.options())
        over = {o: f"over the budget of {self.budget.time:g}x" for o in options if o.time > self.budget.time}
        ranked = rank([option for option in options if option not in over], self.objective)
        correction = 1.0
        for option in ranked:
            estimate = correction * self.estimates.memory(option)
            if estimate > self.budget.memory * NEAR:
                over[option] = f"about {estimate:.2f}x the memory, over {self.budget.memory:g}x"
                continue
            try:
                costs = self.costs(option)
            except SplitError as error:
                over[option] = error.what
                continue
            why = self.budget.why_not(costs)
            if why is None:
                return self._made(option, costs, ranked, over)
            over[option], correction = why, costs.memory / self.estimates.memory(option)
        raise self._nothing(options)

    def _made(
        self, option: Option, costs: Costs, ranked: Mapping[Option, float], over: Mapping[Option, str]
    ) -> Choice:
        left = {other: value for other, value in ranked.items() if other not in over}
        best_over = {other: over[other] for other in rank(over, self.objective)}
        others = runners_up(option, left, best_over, self.objective)
        return Choice(option, ranked[option], reason_for(option, left, self.objective), costs, tuple(others))

    def _nothing(self, options: Sequence[Option]) -> SplitError:
        """That nothing fits, with the cheapest that there is."""
        refusal: SplitError | None = None
        found: dict[Option, Costs] = {}
        for option in sorted(options, key=lambda o: self.budget.excess(o.time, self.estimates.memory(o))):
            try:
                found[option] = self.costs(option)
            except SplitError as error:
                refusal = refusal or error
            if len(found) == NEAREST:
                break
        if not found:
            return could_not_cut(len(options), refusal)
        cheapest = min(found, key=lambda o: self.budget.excess(found[o].time, found[o].memory))
        return none_fits(str(self.budget), cheapest, found[cheapest])
