"""Choose splits: the best by an objective, within budgets of time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

from torch import nn

from fxcollab.analysis.effects import Observation
from fxcollab.analysis.partition import partition
from fxcollab.arguments import checked
from fxcollab.codegen.branches import Recompute, check_recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.costs import Costs, Levels, costs_of, ratio, state_bytes, step_cost, trained_bytes
from fxcollab.errors import CaptureError, FxCollabError, PatternError, SplitError
from fxcollab.fx_utils import collector_paused
from fxcollab.limits import check_optimizer
from fxcollab.patterns import AUTO, Fanouts, fanouts_to_choose
from fxcollab.sources.loaded import model_of
from fxcollab.splits.budget import Amount, limits_of, ratios
from fxcollab.splits.candidates import Survey, survey
from fxcollab.splits.choice import Choice, crossing_at, listed, reason_for, runners_up
from fxcollab.splits.cuts import K, carriers
from fxcollab.splits.option import TREES, Option, OptionScore, branches_of, evenness, rank, thinned
from fxcollab.tracing.capture import Granularity
from fxcollab.tracing.interface import ExampleInputs
from fxcollab.tree import Fanout, HeadTree

SIMULATED = 200_000
"""Of options with so many nodes in all heads together costs are exact; those after them are estimated before."""
NEAR = 1.1
"""By which factor estimates of memory may be off, after correction by the last exact cost."""
_DEEPER = "list more with find_splits(depth=3) (fxcollab splits --depth 3) and name the splits"


@checked
@collector_paused()
def choose_splits(
    model: nn.Module | Callable[[], nn.Module],
    example_inputs: ExampleInputs | None = None,
    *,
    fanouts: Fanouts | None = None,
    max_time: Amount | None = None,
    max_memory: Amount | None = None,
    objective: OptionScore = evenness,
    optimizer: float = 1.0,
    granularity: Granularity = "auto",
    recompute: Recompute | None = None,
) -> Choice:
    """The splits for a head tree over ``model``, with the reason, the costs and the runners-up.

    Of all ways to cut at the candidates of `find_splits` that keep the budgets, the one with the highest value of the
    objective is taken; but of those that reach two thirds of that value, cuts at the ends of stages come first, then
    cuts at a single value each, and a level that does less than a fifth of an even share of the work comes last. Of
    equals the one with shallower names is taken. With an objective of your own only equals tie.

    That an even tree makes a lower error is the paper's argument, not a measurement of this library.

    Args:
        model: any module on any device, meta included, which stays as it is; or a factory of one.
        example_inputs: tuple or dict, as for `transform`; costs are those at their shapes (default: those of a usual
            input that fits).
        fanouts: branches at each split, as for `transform` (default ``(2, 2)``): there are as many splits. ``auto``,
            which needs a budget, also chooses the tree: the best by the objective among even trees and ladders of up
            to three splits and eight heads; of equals that with more heads.
        max_time: upper limit of a training step's FLOPs, as a ratio to the original's: 1.75 or ``"1.75x"`` (default:
            no limit).
        max_memory: upper limit of the peak of a training step's memory, as such a ratio or as a size, such as
            ``"20GB"`` (default: no limit).
        objective: how good an `Option` is (default `evenness`).
        optimizer: number of values that the optimizer keeps for each trained one (default 1): 1 for SGD with
            momentum, 2 for Adam.
        granularity: as for `find_splits` (default ``auto``).
        recompute: as for `transform` (default None); costs are those with it.

    Raises:
        PatternError: a budget below the original's cost, wrong fan-outs, or an objective that returns no number.
        SplitError: no single value cuts the model, there are fewer cuts than splits, or no choice keeps the
            budgets; the hint says what there is.
        CaptureError: as for `find_splits`.
    """
    check_recompute(recompute)
    limits = list(limits_of(max_time, max_memory))
    if fanouts == AUTO and not limits:
        raise PatternError(
            "Fan-outs can't be chosen without a budget.",
            why="the more heads, the more a training step costs",
            hint="give one, max_time=1.75 (--max-time 1.75x), or name the fan-outs",
        )
    wanted = fanouts_to_choose("hierarchical", None, fanouts)
    trees = TREES if wanted == AUTO else (wanted,)
    model = model_of(model)
    found = survey(model, example_inputs, granularity)
    if not any(cost.forward_flops for cost in found.cuts.costs.nodes.values()):
        raise SplitError(
            f"Splits of {type(model).__qualname__} can't be chosen.",
            why="it has no operation whose FLOPs are known, so the work of levels can't be compared",
            hint="name the splits yourself; find_splits (fxcollab splits) lists them",
        )
    cuts = found.cuts
    check_optimizer(optimizer)
    original = step_cost(cuts.captured, cuts.costs, Levels.flat(cuts.captured, cuts.costs), optimizer)
    by_name = ratios(limits, original, recompute)
    found_choice = _Search(found, trees, by_name, objective, optimizer, recompute).choice()
    return replace(found_choice, example_inputs=example_inputs)


class _Search:
    """Ranks options by estimates of their costs, and captures them one after the other until one keeps the limits."""

    def __init__(
        self,
        found: Survey,
        trees: Sequence[tuple[Fanout, ...]],
        limits: Mapping[str, float],
        objective: OptionScore,
        optimizer: float,
        recompute: Recompute | None,
    ) -> None:
        self._found, self._trees, self._limits = found, trees, limits
        self._objective, self._optimizer, self._recompute = objective, optimizer, recompute
        self._observed: dict[CollabGraphModule, Observation] = {}
        self._places = {candidate: place for place, candidate in found.candidates.items()}
        cuts = found.cuts
        self._state = cuts.before(state_bytes(cuts.captured, optimizer))
        self._kept = cuts.before(cuts.costs.kept_bytes())
        self._trained = cuts.before(trained_bytes(cuts.captured))
        self._flops = cuts.before({node: cost.flops for node, cost in cuts.costs.nodes.items()})
        self._again = cuts.before({node: cost.forward_flops for node, cost in cuts.costs.nodes.items()})

    def choice(self) -> Choice:
        """Of the first in rank of each tree that keep the limits, the best."""
        options = list(self._options())
        if not options:
            raise _too_few_cuts(self._found, min(map(len, self._trees)))
        max_time = self._limits.get("time", math.inf)
        over = {option: f"over the budget of {max_time:.3g}x" for option in options if option.time > max_time}
        ranked = rank([option for option in options if option not in over], self._objective)
        searches = {fanouts: self._within(fanouts, ranked, over) for fanouts in self._trees}
        firsts = {fanouts: next(search, None) for fanouts, search in searches.items()}
        refusal: FxCollabError | None = None
        while found := [option for option in firsts.values() if option is not None]:
            by_default = self._objective is evenness
            option = max(found, key=lambda o: (by_default and o.is_balanced, round(ranked[o], 6), o.heads))
            try:
                self._check(option)
            except (CaptureError, SplitError) as error:
                over[option], refusal = error.what, refusal or error
                firsts[option.fanouts] = next(searches[option.fanouts], None)
            else:
                return self._explained(option, ranked, over)
        raise self._none_fits(options, refusal)

    def _within(
        self, fanouts: tuple[Fanout, ...], ranked: Iterable[Option], over: dict[Option, str]
    ) -> Iterator[Option]:
        """The options for a tree that keep the limits, in rank; what the others exceed is added to ``over``."""
        max_memory = self._limits.get("memory", math.inf)
        correction, left_to_simulate = 1.0, SIMULATED / len(self._trees)
        for option in rank([option for option in ranked if option.fanouts == fanouts], self._objective):
            if left_to_simulate <= 0 and (estimate := correction * self._memory(option)) > max_memory * NEAR:
                over[option] = f"about {estimate:.2f}x the memory, over {max_memory:.3g}x"
                continue
            costs = self._costs(option)
            left_to_simulate -= option.heads * len(self._found.cuts.costs.nodes)
            exceeded = self._exceeded(costs)
            if exceeded:
                over[option], correction = exceeded, costs.memory / self._memory(option)
            else:
                yield option

    def _explained(self, option: Option, ranked: Mapping[Option, float], over: Mapping[Option, str]) -> Choice:
        left = {other: value for other, value in ranked.items() if other not in over}
        best_over = {other: over[other] for other in rank(over, self._objective)}
        for other in list(best_over)[:1]:
            best_over[other] += self._with_recompute(other)
        others = runners_up(option, left, best_over, self._objective)
        reason = reason_for(option, left, self._objective) + crossing_at(option)
        if len(self._trees) > 1:
            reason = f"fan-outs {option.fanouts} make {option.heads} heads; {reason}"
        if self._found.cuts.costs.on_examples:
            reason += "; counted on the example inputs, on whose values the work depends"
        return Choice(option, left[option], reason, self._costs(option), tuple(others))

    def _exceeded(self, costs: Costs) -> str:
        """What is over the limits, by how much."""
        values = [(name, getattr(costs, name), limit) for name, limit in self._limits.items()]
        return " and ".join(
            f"{value:.2f}x the {name} is over {limit:.3g}x" for name, value, limit in values if value > limit
        )

    def _with_recompute(self, option: Option) -> str:
        """What an option would cost if branches were computed again, if it keeps the limits then."""
        if self._recompute or "memory" not in self._limits:
            return ""
        costs = self._costs(option, "heads")
        fits = not self._exceeded(costs)
        return (
            f"; recompute keeps it, at {costs.time:.2f}x the time and {costs.memory:.2f}x the memory" if fits else ""
        )

    def _options(self) -> Iterator[Option]:
        """All ways to cut one behind the other in which every level has parameters."""
        for fanouts in self._trees:
            branches = branches_of(fanouts)
            for places in combinations(thinned(self._found.candidates, len(fanouts)), len(fanouts)):
                cuts = tuple(self._found.candidates[place] for place in places)
                if all(self._found.is_behind(*pair) for pair in pairwise(places)):
                    flops = self._over_levels(places, branches, self._flops)
                    if self._recompute:
                        flops += self._over_levels(places, (0, *branches[1:]), self._again)
                    yield Option(cuts, fanouts, flops / self._flops[-1])

    def _memory(self, option: Option) -> float:
        """About the ratio of the peaks: with what is kept as the backward starts, or with gradients as it ends."""
        places, branches = [self._places[cut] for cut in option.cuts], branches_of(option.fanouts)
        kept = self._over_levels(places, (1,) * len(branches) if self._recompute else branches, self._kept)
        peak = max(kept, self._over_levels(places, branches, self._trained))
        state = self._over_levels(places, branches, self._state)
        return ratio(state + peak, self._state[-1] + max(self._kept[-1], self._trained[-1]))

    @staticmethod
    def _over_levels(places: Sequence[int], instances: Sequence[int], before: Sequence[float]) -> float:
        """The sum over the instances of all levels, from the sums before each cut."""
        edges = pairwise((0, *(before[place] for place in places), before[-1]))
        return sum(count * (end - start) for count, (start, end) in zip(instances, edges, strict=True))

    def _costs(self, option: Option, recompute: Recompute | None = None) -> Costs:
        """What an option costs, from the profile of the graph in which the candidates were found."""
        found, tree = self._found.cuts, HeadTree(option.splits, option.fanouts)
        nodes, state = self._levels(option, found.costs.nodes), self._levels(option, state_bytes(found.captured, 0))
        return costs_of(
            found.captured, found.costs, Levels(tree, nodes, state), self._optimizer, recompute or self._recompute
        )

    def _levels(self, option: Option, keys: Iterable[K]) -> dict[K, int]:
        """The level of every node, or parameter and buffer."""
        cuts = [self._found.cuts.cuts[self._places[candidate]] for candidate in option.cuts]
        return {key: sum(key in cut.behind for cut in cuts) for key in keys}

    def _check(self, option: Option) -> None:
        """Cut the model at an option's splits.

        Raises:
            CaptureError, SplitError: it can't be cut there, or not at the values meant.
        """
        searched, found = self._found.searched, self._found.cuts
        captured = found.captured if searched.is_open else searched.capture(option.splits)
        cut = partition(captured, HeadTree(option.splits, option.fanouts), self._observed.get(captured))
        if searched.is_open:  # the next option is cut in the same graph
            self._observed[captured] = cut.observation
        meant = self._levels(option, (name for name, _ in captured.named_parameters()))
        if any(cut.state[name] != level for name, level in meant.items()):
            raise SplitError(
                f"One of {listed(option.splits)} names another value once all of them are captured.",
                why="the nodes of a graph are numbered, and modules that are opened add some",
                hint="name the splits by modules",
            )

    def _none_fits(self, options: Sequence[Option], refusal: FxCollabError | None) -> SplitError:
        """The error that names the cheapest option, or why those within the limits can't be cut."""

        def excess(time: float, memory: float) -> float:
            return max(time / self._limits.get("time", math.inf), memory / self._limits.get("memory", math.inf))

        if refusal is not None:
            return SplitError(
                f"None of {len(options)} choices can be cut.",
                where=refusal.where,
                why=refusal.what,
                hint=f"ask for fewer splits, or {_DEEPER}",
            )
        cheapest = min(options, key=lambda option: excess(option.time, self._memory(option)))
        costs = self._costs(cheapest)
        ratios = f"{costs.time:.2f}x the time, {costs.memory:.2f}x the memory"
        budget = " and ".join(f"{limit:.3g}x the {name}" for name, limit in self._limits.items())
        return SplitError(
            f"No choice of {_splits(len(cheapest.cuts))} keeps within {budget}.",
            why=f"of {len(options)} that are tried the cheapest is {listed(cheapest.splits)}: {ratios}"
            f"{self._with_recompute(cheapest)}",
            hint="raise the budget, ask for fewer splits or smaller fan-outs, or name later splits",
        )


def _too_few_cuts(found: Survey, splits: int) -> SplitError:
    name, names = type(found.searched.model).__qualname__, [each.name for each in found.candidates.values()]
    if names:
        return SplitError(
            f"{name} can't be split {splits} times.",
            why=f"only {listed(names)} cut{'s' * (len(names) == 1)} it, and no {splits} lie one behind the other "
            "with parameters between them",
            hint=f"ask for {_splits(min(len(names), splits - 1))}, or {_DEEPER}" if splits > 1 else _DEEPER,
        )
    if not carriers(found.cuts.captured, found.cuts.costs):
        why, hint = "none of its values depends on a parameter and could carry a gradient", "give a model that learns"
        return SplitError(f"{name} can't be split.", why=why, hint=hint)
    return SplitError(f"{name} can't be cut.", why="no value inside it has a name to cut at", hint=_DEEPER)


def _splits(count: int) -> str:
    return f"{count} split{'s' * (count > 1)}"
