"""The points at which a model can be cut, and what lies before and behind each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

from torch import fx, nn

from fxcollab._torch import DATA_DEPENDENT_ERRORS
from fxcollab.arguments import checked
from fxcollab.costs.profile import explained, profile
from fxcollab.errors import warn_caller
from fxcollab.sources.loaded import model_of
from fxcollab.splits.cuts import Cuts, K, cuts_of
from fxcollab.splits.opening import Searched, opened, value_names
from fxcollab.tracing.capture import Granularity
from fxcollab.tracing.examples import known_interface, why_not
from fxcollab.tracing.interface import ExampleInputs


@dataclass(frozen=True)
class Candidate:
    """A point at which the model can be cut.

    Attributes:
        name: the split's name: of the outermost module that returns the value, or of its node; ``a+b`` of several.
        is_module: whether that is a module's.
        shape, dtype: of the value; None where it is not a single tensor.
        flops: floating point operations of a forward, before and behind the cut.
        parameters: number of values in parameters, before and behind.
        activations: bytes that are kept for the backward, before and behind.
        crossing: number of values that are read behind the cut, and their bytes. There is one where everything passes
            through the value; skip connections, for example, are others.
        run: which of how many candidates in a row that have this resolution: (3, 6). The last one ends a stage.
        ends_stage: whether the value's resolution changes behind it, and the stage has parameters. For images and
            videos the number of channels is not part of the resolution: a dense block adds some with every layer.
    """

    name: str
    is_module: bool
    shape: tuple[int, ...] | None
    dtype: str | None
    flops: tuple[int, int]
    parameters: tuple[int, int]
    activations: tuple[int, int]
    crossing: tuple[int, int] = (1, 0)
    run: tuple[int, int] = (1, 1)
    ends_stage: bool = False

    @property
    def is_narrow(self) -> bool:
        """Whether everything behind the cut passes through one value."""
        return self.crossing[0] == 1

    @property
    def share(self) -> float:
        """The part of the forward's operations that lies before the cut, from 0 to 1."""
        total = sum(self.flops)
        return self.flops[0] / total if total else 0.0


@dataclass(frozen=True, eq=False)
class Survey:
    """A model, opened in search of splits; candidates are listed by their place among the cuts."""

    cuts: Cuts
    searched: Searched
    candidates: Mapping[int, Candidate]

    def is_behind(self, shallow: int, deep: int) -> bool:
        """Whether the second of two candidates lies behind the first, and parameters between them."""
        one, other = self.cuts.cuts[shallow], self.cuts.cuts[deep]
        has_parameters = self.candidates[deep].parameters[0] > self.candidates[shallow].parameters[0]
        return has_parameters and all(value in one.behind for value in other.values)


@checked
def find_splits(
    model: nn.Module | Callable[[], nn.Module],
    example_inputs: ExampleInputs | None = None,
    *,
    granularity: Granularity = "auto",
    depth: int | None = None,
) -> tuple[Candidate, ...]:
    """The points at which ``model`` can be cut, ordered by the work before them.

    These are all values through which every gradient passes; where none is for more than an eighth of the work, also
    single values or smallest sets of values on which all outputs depend. The model runs in train mode, on fake
    tensors, or, where its work depends on values, as a copy on the example inputs.

    Args:
        model: any module on any device, meta included, which stays as it is; or a factory of one.
        example_inputs: tuple or dict, as for `transform` (default: a usual input that fits).
        granularity: ``auto`` looks between modules, ``op`` between all operations.
        depth: open all modules down to so many levels below the root (default: those that do more than an eighth of
            the work).

    Returns:
        The candidates; none where no value with a name cuts the model.

    Raises:
        CaptureError: no input is known, the model's own forward can't be captured, or it depends on the values of
            tensors.
    """
    return tuple(survey(model_of(model), example_inputs, granularity, depth).candidates.values())


def survey(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    granularity: Granularity = "auto",
    depth: int | None = None,
) -> Survey:
    """Open ``model`` and find the candidates in it; arguments and errors are those of `find_splits`."""
    interface = known_interface(model, example_inputs)
    searched = Searched(model, interface, example_inputs, granularity)
    with explained(model, interface):
        captured = opened(searched, depth)
        try:
            profiled = profile(captured, interface, example_inputs)
        except DATA_DEPENDENT_ERRORS:
            raise
        except Exception:  # whatever a graph raises in which hooks of opened modules are missed
            if searched.is_open or why_not(model, interface, training=True) is not None:
                raise
            warn_caller("splits inside of modules are not searched: opened, the model fails where it works as it is")
            captured = searched.capture()
            profiled = profile(captured, interface, example_inputs)
    names = value_names(captured, searched)
    cuts = cuts_of(captured, profiled, names)
    found = _without_repeats(dict(_candidates(cuts, names)))
    stages = dict(_with_stages({place: each for place, each in found.items() if cuts.cuts[place].is_narrow}))
    return Survey(cuts, searched, {place: stages.get(place, each) for place, each in found.items()})


def _candidates(cuts: Cuts, names: Mapping[fx.Node, tuple[str, bool]]) -> Iterator[tuple[int, Candidate]]:
    """Those cuts that have a name, and parameters behind them."""

    def around(numbers: Mapping[K, int]) -> list[tuple[int, int]]:
        before = cuts.before(numbers)
        return [(each, before[-1] - each) for each in before]

    costs = cuts.costs.nodes
    flops = around({node: cost.forward_flops for node, cost in costs.items()})
    parameters = around({name: parameter.numel() for name, parameter in cuts.captured.named_parameters()})
    activations = around(cuts.costs.kept_bytes())
    for index, cut in enumerate(cuts.cuts):
        if parameters[index][1] and all(node in names for node in cut.values):
            first, alone = costs[cut.values[0]], len(cut.values) == 1
            yield (
                index,
                Candidate(
                    "+".join(names[node][0] for node in cut.values),
                    alone and names[cut.values[0]][1],
                    first.shape if alone else None,
                    first.dtype if alone else None,
                    flops[index],
                    parameters[index],
                    activations[index],
                    (len(cut.crossing), sum(costs[node].nbytes for node in cut.crossing)),
                ),
            )


def _without_repeats(found: Mapping[int, Candidate]) -> dict[int, Candidate]:
    """Without values inside modules that cut where a value of the root or of a module does, or a later one inside."""

    def is_inside(candidate: Candidate) -> bool:
        return "." in candidate.name and not candidate.is_module

    last = {(each.flops, each.parameters): place for place, each in found.items() if is_inside(each)}
    taken = {(each.flops, each.parameters) for each in found.values() if not is_inside(each)}
    kept = {place for key, place in last.items() if key not in taken}
    return {place: each for place, each in found.items() if place in kept or not is_inside(each)}


def _with_stages(found: Mapping[int, Candidate]) -> Iterator[tuple[int, Candidate]]:
    """Candidates in a row that have the same resolution are a stage; its last one ends it."""
    shapes = [candidate.shape for candidate in found.values()]
    changes = accumulate((_is_other_resolution(*pair) for pair in pairwise(shapes)), initial=0)
    numbered = list(zip(changes, found.items(), strict=False))
    before = 0
    for number, group in groupby(numbered, key=lambda entry: entry[0]):
        stage = [entry for _, entry in group]
        last = stage[-1][1]
        ends_stage = number != numbered[-1][0] and last.parameters[0] > before
        before = last.parameters[0]
        for index, (place, candidate) in enumerate(stage, start=1):
            yield place, replace(candidate, run=(index, len(stage)), ends_stage=ends_stage and candidate is last)


def _is_other_resolution(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    """Whether more changed than the number of channels, in whichever dimension these are."""
    if one is None or other is None or len(one) != len(other):
        return one != other
    changed = sum(a != b for a, b in zip(one, other, strict=True))
    return changed > (1 if len(one) >= 4 else 0)  # images and videos have channels
