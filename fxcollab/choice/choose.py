"""Choose splits: the best by an objective, within budgets of time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, combinations, pairwise

from torch import nn

from fxcollab.capture import capture
from fxcollab.capture.capture import Granularity
from fxcollab.capture.interface import ExampleInputs
from fxcollab.choice.budget import Budget
from fxcollab.choice.candidates import Survey, survey
from fxcollab.choice.explain import Choice, reason_for, runners_up
from fxcollab.choice.openings import is_open
from fxcollab.choice.option import Objective, Option, evenness
from fxcollab.choice.rank import rank
from fxcollab.choice.refusals import could_not_cut, none_fits, too_few_cuts, uncounted, wrong_budget
from fxcollab.choice.thin import thinned
from fxcollab.costs import Costs, Placement, costs_of, profile
from fxcollab.costs.costs import ratio
from fxcollab.costs.step import held_bytes, step_cost
from fxcollab.errors import SplitError
from fxcollab.partition import partition
from fxcollab.tree import HeadTree, hierarchical


def choose_splits(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    levels: int | None = None,
    fanouts: Sequence[int] | None = None,
    max_time: float | None = None,
    max_memory: float | None = None,
    objective: Objective = evenness,
    measure: bool = False,
    optimizer: float = 1.0,
    granularity: Granularity = "auto",
    depth: int | None = None,
) -> Choice:
    """The splits for a head tree over ``model``, with the reason, the costs and the runners-up.

    Of all ways to cut at the candidates of `find_splits` that keep the budgets, the one that the objective values
    most is taken; but where cuts at the ends of stages reach two thirds of that value, and no level does less than a
    fifth of an even share of the work, the best of those. Of equals the one with shallower names is taken.

    Args:
        model: any module on any device, meta included; it stays as it is.
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
    count = levels if levels is not None else len(fanouts) if fanouts is not None else 2
    tree = hierarchical([str(level) for level in range(1, count + 1)], fanouts)
    found = survey(model, example_inputs, granularity, depth, measure)
    if not any(cost.forward_flops for cost in found.chain.costs.nodes.values()):
        raise uncounted(model)
    if len(found.candidates) < tree.depth:
        raise too_few_cuts(model, found, tree.depth)
    estimates = _Estimates(found, tree, optimizer)

    def costs(option: Option) -> Costs:
        captured, profiled = found.chain.captured, found.chain.costs
        if not is_open(model, granularity):
            captured = capture(model, option.splits, example_inputs, granularity, interface=found.interface)
            profiled = profile(captured, found.interface)
        cut = partition(captured, HeadTree(option.splits, tree.fanouts))
        counted = costs_of(captured, Placement.of(captured, cut), profiled, optimizer)
        return estimates.timed(counted, option) if measure else counted

    return _Choosing(estimates, budget, objective, costs).choice()


def _budget(max_time: float | None, max_memory: float | None) -> Budget:
    for name, limit in (("time", max_time), ("memory", max_memory)):
        if limit is not None and not limit >= 1:
            raise wrong_budget(name, limit)
    return Budget(max_time or math.inf, max_memory or math.inf)


class _Estimates:
    """Options, with what is known of their costs before any of them is captured."""

    def __init__(self, found: Survey, tree: HeadTree, optimizer: float) -> None:
        self._found, self._tree, self._optimizer = found, tree, optimizer
        self._chain = found.chain
        self._places = {candidate: place for place, candidate in found.candidates.items()}
        flops = {node: float(cost.flops) for node, cost in self._chain.costs.nodes.items()}
        self._before = list(accumulate(self._chain.sums(found.seconds or flops)))

    def options(self) -> Iterator[Option]:
        """All ways to cut in which every level learns, with their times."""
        branches = [math.prod(self._tree.fanouts[:level]) for level in range(self._tree.depth + 1)]
        total = self._before[-1]
        for places in combinations(thinned(self._found.candidates, self._tree.depth), self._tree.depth):
            cuts = tuple(self._found.candidates[place] for place in places)
            if all(deep.parameters[0] > shallow.parameters[0] for shallow, deep in pairwise(cuts)):
                edges = pairwise((0.0, *(self._before[place] for place in places), total))
                step = sum(count * (deep - shallow) for count, (shallow, deep) in zip(branches, edges, strict=True))
                yield Option(cuts, self._tree.fanouts, step / total)

    def timed(self, costs: Costs, option: Option) -> Costs:
        """With the seconds that were measured."""
        seconds = self._before[-1]
        return Costs(replace(costs.original, seconds=seconds), replace(costs.training, seconds=option.time * seconds))

    def least_memory(self, option: Option) -> float:
        """A ratio that the peak of memory can't be under: what is held anyway, and kept for the backward."""
        cuts = option.cuts
        edges = pairwise((0, *(cut.activations[0] for cut in cuts), sum(cuts[0].activations)))
        branches = (math.prod(option.fanouts[:level]) for level in range(len(cuts) + 1))
        kept = sum(count * (deep - shallow) for count, (shallow, deep) in zip(branches, edges, strict=True))
        held = held_bytes(self._chain.captured, self._placement(option), self._optimizer)
        return ratio(held + kept, self._original)

    def memory(self, option: Option) -> float:
        """The ratio of the peaks, as the opened model tells it: next to what a captured one gives."""
        cost = step_cost(self._chain.captured, self._chain.costs, self._placement(option), self._optimizer)
        return ratio(cost.memory, self._original)

    @cached_property
    def _original(self) -> int:
        captured = self._chain.captured
        return step_cost(captured, self._chain.costs, Placement.of_original(captured), self._optimizer).memory

    def _placement(self, option: Option) -> Placement:
        return self._chain.placement([self._places[cut] for cut in option.cuts], option.fanouts)


NEAR = 1.05
"""By which factor an estimate of memory may be off."""


@dataclass(frozen=True, eq=False)
class _Choosing:
    """The search: options, and what they cost as they would be captured."""

    estimates: _Estimates
    budget: Budget
    objective: Objective
    costs: Callable[[Option], Costs]

    def choice(self) -> Choice:
        """The first in rank that keeps the budget."""
        options = list(self.estimates.options())
        over = {o: f"over the budget of {self.budget.time:g}x" for o in options if not self._in_time(o)}
        ranked = rank(filter(self._in_time, options), self.objective)
        for option in ranked:
            found = self._tried(option)
            if isinstance(found, Costs):
                left = {other: value for other, value in ranked.items() if other not in over}
                reason = reason_for(option, left, self.objective)
                others = runners_up(option, left, {o: over[o] for o in rank(over, self.objective)}, self.objective)
                return Choice(option, ranked[option], reason, found, tuple(others))
            over[option] = found
        raise self._nothing(options)

    def _in_time(self, option: Option) -> bool:
        return option.time <= self.budget.time

    def _tried(self, option: Option) -> Costs | str:
        """Its costs, or why it is not taken."""
        limit = self.budget.memory * NEAR
        if limit < math.inf:
            least = self.estimates.least_memory(option)
            estimate = least if least > limit else self.estimates.memory(option)
            if estimate > limit:
                return f"{estimate:.2f}x the memory is over {self.budget.memory:g}x"
        try:
            costs = self.costs(option)
        except SplitError as error:
            return error.what
        return self.budget.why_not(costs) or costs

    def _nothing(self, options: Sequence[Option]) -> SplitError:
        """That nothing fits, with the cheapest that there is."""
        refusal: SplitError | None = None
        for option in sorted(options, key=lambda o: self.budget.excess(o.time, self.estimates.least_memory(o))):
            try:
                return none_fits(str(self.budget), option, self.costs(option))
            except SplitError as error:
                refusal = refusal or error
        return could_not_cut(len(options), refusal)
