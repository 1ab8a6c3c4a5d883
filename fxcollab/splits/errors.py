"""Why nothing can be chosen, and the way out."""

from __future__ import annotations

from torch import nn

from fxcollab.costs.costs import Costs
from fxcollab.errors import PatternError, SplitError
from fxcollab.splits.candidates import Survey
from fxcollab.splits.chain import carriers, narrowest
from fxcollab.splits.explain import listed
from fxcollab.splits.names import returned_by
from fxcollab.splits.option import Option


def wrong_budget(name: str, limit: float) -> PatternError:
    """A budget below the original's own cost."""
    return PatternError(
        f"A budget of {limit:g}x the {name} can't be kept.",
        why="it is a ratio to the original model's, and several heads cost more than one",
        hint=f"give 1 or more: max_{name}=1.75 (--max-{name} 1.75x)",
    )


def uncounted(model: nn.Module) -> SplitError:
    """Nothing to compare options by."""
    return SplitError(
        f"Splits of {type(model).__qualname__} can't be chosen.",
        why="of its operations none is counted as a floating point operation, so no level's work can be told",
        hint="name the splits yourself; find_splits (fxcollab splits) lists them",
    )


_DEEPER = "list more with find_splits(depth=3) (fxcollab splits --depth 3) and name the splits"


def too_few_cuts(model: nn.Module, found: Survey, levels: int) -> SplitError:
    """Fewer candidates than levels; where there are none, what would cut the model instead."""
    name = type(model).__qualname__
    names = [candidate.name for candidate in found.candidates.values()]
    if names:
        return SplitError(
            f"{name} can't be split {levels} times at one value.",
            why=f"of its values, only {listed(names)} cut{'s' * (len(names) == 1)} it",
            hint=f"ask for {len(names)} level{'s' * (len(names) > 1)}, or {_DEEPER}",
        )
    if not carriers(found.chain.captured, found.chain.costs):
        why, hint = "none of its values depends on a parameter and could carry a gradient", "give a model that learns"
        return SplitError(f"{name} can't be split.", why=why, hint=hint)
    together = _cut_of_several(found)
    if together is None:
        return SplitError(
            f"{name} can't be cut at one value.", why="no value inside it has a name to cut at", hint=_DEEPER
        )
    return SplitError(
        f"{name} can't be cut at one value.",
        why="wherever it is cut, several values carry gradients to what lies behind",
        hint=f"cut at all of them at once: splits=[{together!r}] (--splits {together})",
    )


def _cut_of_several(found: Survey) -> str | None:
    """The narrowest cut near the middle as a split's name, where its values have names."""
    chain = found.chain
    values = narrowest(chain.captured, chain.costs)
    names = returned_by(chain.captured.modes.train)
    return "+".join(names[value] for value in values) if len(values) > 1 and all(v in names for v in values) else None


def _splits(count: int) -> str:
    return f"{count} split{'s' * (count > 1)}"


def none_fits(budget: str, option: Option, costs: Costs) -> SplitError:
    """No option keeps the budget; ``option`` comes nearest."""
    return SplitError(
        f"No choice of {_splits(len(option.cuts))} keeps within {budget}.",
        why=f"the cheapest is {listed(option.splits)}: {costs.time:.2f}x the time, {costs.memory:.2f}x the memory",
        hint="raise the budget, or ask for fewer splits or smaller fan-outs",
    )


def another_value(option: Option) -> SplitError:
    """In the graph that is captured for the option, a node of that name is another one."""
    return SplitError(
        f"One of {listed(option.splits)} names another value once all of them are captured.",
        why="the nodes of a graph are numbered, and modules that are opened add some",
        hint="name the splits by modules",
    )


def could_not_cut(options: int, refusal: SplitError | None) -> SplitError:
    """There is no option, or every one was refused."""
    return SplitError(
        f"None of {options} choices can be cut.",
        where=refusal.where if refusal else None,
        why=refusal.what if refusal else "between no two of the values that cut the model something learns",
        hint=f"ask for fewer splits, or {_DEEPER}",
    )


def refuse_budget_with_recompute(recompute: str | None, *limits: object) -> None:
    """Refuse to choose for the plain graph what another one shall keep.

    Raises:
        PatternError: a budget was given, and branches are to be computed again.
    """
    if recompute and any(limit is not None for limit in limits):
        raise PatternError(
            "A budget can't be kept with branches that are computed again.",
            why="splits are chosen by what the plain graph costs",
            hint="leave one of both out, or name the splits (fxcollab costs --recompute heads says what they cost)",
        )
