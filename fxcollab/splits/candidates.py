"""The points at which a model can be cut at one value, and what lies before and behind each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

from torch import fx, nn

from fxcollab.costs.attribution import Moment
from fxcollab.costs.clock import measured
from fxcollab.costs.errors import uncountable
from fxcollab.costs.profile import Profile, profile
from fxcollab.errors import CaptureError
from fxcollab.sources.loaded import model_of
from fxcollab.splits.chain import Chain, chain_of
from fxcollab.splits.names import SplitName, value_names
from fxcollab.splits.opening import Searched, opened
from fxcollab.tracing.capture import Granularity
from fxcollab.tracing.examples import known_interface
from fxcollab.tracing.interface import ExampleInputs

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Candidate:
    """A point at which the model can be cut at one value.

    Attributes:
        name: the split's name: of the outermost module that returns the value, or of its node.
        is_module: whether that is a module's.
        shape, dtype: of the value; None where it is no single tensor.
        flops: of a forward, up to the cut, and behind it.
        parameters: the number of values in parameters, before and behind.
        activations: bytes that are kept for the backward, before and behind.
        seconds: of a step, forward and backward, before and behind; None where nothing was measured.
        run: which of how many candidates in a row that have this resolution: (3, 6). Where a stage ends, it is the
            last.
        ends_stage: whether the value's resolution changes behind it, where something that learns lies in the stage.
            Of images and videos channels alone are no resolution: a dense block adds some with every layer.
    """

    name: str
    is_module: bool
    shape: tuple[int, ...] | None
    dtype: str | None
    flops: tuple[int, int]
    parameters: tuple[int, int]
    activations: tuple[int, int]
    seconds: tuple[float, float] | None = None
    run: tuple[int, int] = (1, 1)
    ends_stage: bool = False

    @property
    def share(self) -> float:
        """The part of the forward's operations that lies before the cut, from 0 to 1."""
        total = sum(self.flops)
        return self.flops[0] / total if total else 0.0


@dataclass(frozen=True, eq=False)
class Survey:
    """A model, opened in search of splits.

    Attributes:
        chain: the captured model as a chain of values.
        searched: the model, with the inputs on which it was counted.
        candidates: by their place in the chain, in the order of the data flow.
        seconds: what each node takes, if that was measured.
    """

    chain: Chain
    searched: Searched
    candidates: Mapping[int, Candidate]
    seconds: Mapping[fx.Node, float] | None


def find_splits(
    model: nn.Module | Callable[[], nn.Module],
    example_inputs: ExampleInputs | None = None,
    *,
    granularity: Granularity = "auto",
    depth: int | None = None,
    measure: bool = False,
) -> tuple[Candidate, ...]:
    """Every point at which ``model`` can be cut at one value, in the order of the data flow.

    Nothing is computed: all is counted on fake tensors, in train mode, at the shapes of ``example_inputs`` or of a
    usual input that fits.

    Args:
        model: any module on any device, meta included; or a factory of one.
        example_inputs: tuple or dict, as for `transform`.
        granularity: ``auto`` looks between modules, ``op`` between all operations.
        depth: open all modules down to so many levels below the root; by default those that do more than an eighth
            of the work.
        measure: take the time of every node on this machine; the model needs values.

    Returns:
        The candidates; none where every cut has several values that carry gradients.

    Raises:
        CaptureError: no input is known, the model's own forward can't be captured, or it asks for data.
    """
    return tuple(survey(model_of(model), example_inputs, granularity, depth, measure).candidates.values())


def survey(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    granularity: Granularity = "auto",
    depth: int | None = None,
    measure: bool = False,
) -> Survey:
    """Open ``model`` and find the candidates in it; arguments and errors are those of `find_splits`."""
    interface = known_interface(model, example_inputs)
    searched = Searched(model, interface, example_inputs, granularity)
    try:
        captured = opened(searched, depth)
        chain = chain_of(captured, profile(captured, interface))
    except CaptureError:
        raise
    except Exception as error:  # whatever the user's code raises on a wrong shape
        raise uncountable(model, interface, error) from error
    seconds = _by_node(measured(captured, model, interface, example_inputs)) if measure else None
    names = value_names(captured, searched)
    return Survey(chain, searched, _with_stages(dict(_candidates(chain, names, seconds))), seconds)


def _by_node(seconds: Mapping[Moment, float]) -> Mapping[fx.Node, float]:
    """Forward and backward together."""
    found: dict[fx.Node, float] = defaultdict(float)
    for (_, node), each in seconds.items():
        found[node] += each
    return found


def _candidates(
    chain: Chain, names: Mapping[fx.Node, SplitName], seconds: Mapping[fx.Node, float] | None
) -> Iterator[tuple[int, Candidate]]:
    """Those values of the chain that have a name, and behind which something learns."""
    own = {name: parameter.numel() for name, parameter in chain.captured.named_parameters()}
    flops = _around(chain.sums({node: cost.forward_flops for node, cost in chain.costs.nodes.items()}))
    parameters = _around(chain.sums(own, chain.state))
    activations = _around(chain.sums(kept_bytes(chain.costs)))
    times = _around(chain.sums(seconds)) if seconds is not None else None
    for index, node in enumerate(chain.values):
        if node in names and parameters[index][1]:
            cost = chain.costs.nodes[node]
            yield (
                index,
                Candidate(
                    *names[node],
                    shape=cost.shape,
                    dtype=cost.dtype,
                    flops=flops[index],
                    parameters=parameters[index],
                    activations=activations[index],
                    seconds=times[index] if times else None,
                ),
            )


def kept_bytes(costs: Profile) -> Mapping[fx.Node, int]:
    """Bytes that each node keeps for the backward."""
    kept: dict[fx.Node, int] = {}
    for allocation in costs.allocations:
        if allocation.born[0] == "forward" and allocation.died is not None and allocation.died[0] == "backward":
            kept[allocation.born[1]] = kept.get(allocation.born[1], 0) + allocation.bytes
    return kept


def _around(sums: Sequence[N]) -> list[tuple[N, N]]:
    """What lies before and behind each value, from what lies behind so many of them."""
    total = sum(sums)
    return [(before, total - before) for before in accumulate(sums)]


def _other_resolution(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    """Whether more changed than the channels, wherever these stand."""
    if one is None or other is None or len(one) != len(other):
        return one != other
    changed = sum(a != b for a, b in zip(one, other, strict=True))
    return changed > (1 if len(one) >= _IMAGES else 0)


_IMAGES = 4


def _with_stages(found: Mapping[int, Candidate]) -> Mapping[int, Candidate]:
    """Candidates in a row that have the same resolution are a stage; its last one ends it."""
    places, ordered = list(found), list(found.values())
    ends = [
        index for index, (one, next_) in enumerate(pairwise(ordered)) if _other_resolution(one.shape, next_.shape)
    ]
    counted: list[Candidate] = []
    for start, end in pairwise([-1, *ends, len(ordered) - 1]):
        stage = ordered[start + 1 : end + 1]
        before = ordered[start].parameters[0] if start >= 0 else 0
        learns = bool(stage) and stage[-1].parameters[0] > before
        for place, candidate in enumerate(stage, start=1):
            last = place == len(stage) and end != len(ordered) - 1
            counted.append(replace(candidate, run=(place, len(stage)), ends_stage=last and learns))
    return dict(zip(places, counted, strict=True))
