"""What a training graph will cost, before it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fxcollab.analysis.partition import partition
from fxcollab.codegen.branches import Recompute, check_recompute
from fxcollab.costs.clock import measured
from fxcollab.costs.costs import Costs, costs_of
from fxcollab.costs.errors import uncountable
from fxcollab.costs.profile import profile
from fxcollab.costs.step import Placement
from fxcollab.errors import PatternError
from fxcollab.sources.loaded import model_of
from fxcollab.tracing.capture import Granularity, capture
from fxcollab.tracing.examples import known_interface
from fxcollab.tracing.interface import ExampleInputs
from fxcollab.tree import AUTO, Fanout, Pattern, head_tree, split_names


def training_costs(
    model: nn.Module | Callable[[], nn.Module],
    pattern: Pattern = "hierarchical",
    splits: Sequence[str] | str = (),
    heads: int | None = None,
    fanouts: Sequence[Fanout] | None = None,
    example_inputs: ExampleInputs | None = None,
    *,
    granularity: Granularity = "auto",
    optimizer: float = 1.0,
    measure: bool = False,
    recompute: Recompute | None = None,
) -> Costs:
    """What a training step will cost on the graph that `transform` would make of the same arguments.

    Nothing is built, and nothing computed but on fake tensors, unless times are measured. What is counted is what
    PyTorch would run on the model's device: on meta, attention is not fused, so that its matrices count as memory.

    Args:
        model: any module on any device, meta included, which stays as it is; or a factory of one.
        pattern: as for `transform`.
        splits: as for `transform`.
        heads: as for `transform`.
        fanouts: as for `transform`.
        example_inputs: costs are those at their shapes, or at those of a usual input that fits.
        granularity: as for `transform`.
        optimizer: values that the optimizer holds for each trained one: 1 for SGD with momentum, 2 for Adam.
        measure: take the time of every node on this machine; the model needs values.
        recompute: as for `transform`.

    Raises:
        PatternError, SplitError, CaptureError: as `transform`; or no input is known, or fits.
    """
    if split_names(splits) == (AUTO,):
        raise PatternError("Costs are those of splits.", hint="choose_splits(...).costs are those of chosen ones")
    check_recompute(recompute)
    model = model_of(model)
    interface = known_interface(model, example_inputs)
    tree = head_tree(pattern, split_names(splits), heads, fanouts)
    captured = capture(model, tree.splits, example_inputs, granularity, interface=interface)
    placement = Placement.of(captured, partition(captured, tree), recompute)
    try:
        profiled = profile(captured, interface)
    except Exception as error:  # whatever the user's code raises on a wrong shape
        raise uncountable(model, interface, error) from error
    seconds = measured(captured, model, interface, example_inputs) if measure else None
    return costs_of(captured, placement, profiled, optimizer, seconds)
