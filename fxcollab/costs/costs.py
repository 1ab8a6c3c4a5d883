"""The costs of a training graph and of its original, computed before the graph is built.

Every node runs once for each branch of its level, and its forward twice where branches are computed again. Memory is
found by simulating the profile's allocations in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from fxcollab.analysis.partition import Partition, partition
from fxcollab.arguments import checked
from fxcollab.codegen.branches import Recompute, check_recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.memory import MemorySimulation
from fxcollab.costs.profile import Profile, explained, profile
from fxcollab.costs.text import Entry, as_text, before_and_after
from fxcollab.errors import PatternError
from fxcollab.limits import check_optimizer
from fxcollab.patterns import AUTO, head_tree, split_names
from fxcollab.sources.loaded import model_of
from fxcollab.tracing.capture import Granularity, capture
from fxcollab.tracing.examples import known_interface
from fxcollab.tracing.interface import ExampleInputs
from fxcollab.tree import Fanout, HeadTree


@dataclass(frozen=True)
class StepCost:
    """What one training step costs.

    Attributes:
        flops: floating point operations, forward and backward.
        parameters: number of values in all parameters, peers included.
        activations: bytes that are kept between the forward and the backward.
        memory: bytes at the peak: state, gradients, the optimizer's state, activations and the inputs.
    """

    flops: int
    parameters: int
    activations: int
    memory: int


@dataclass(frozen=True)
class Costs:
    """One training step of a training graph, and one of its original. Ratios are of the first to the second.

    Attributes:
        original: of the original.
        training: of the training graph.
    """

    original: StepCost
    training: StepCost

    @property
    def time(self) -> float:
        """Ratio of times, estimated by FLOPs; 1 if there are none."""
        return self.flops

    @property
    def flops(self) -> float:
        """Ratio of floating point operations."""
        return ratio(self.training.flops, self.original.flops)

    @property
    def parameters(self) -> float:
        """Ratio of numbers of parameters."""
        return ratio(self.training.parameters, self.original.parameters)

    @property
    def activations(self) -> float:
        """Ratio of the bytes kept for the backward."""
        return ratio(self.training.activations, self.original.activations)

    @property
    def memory(self) -> float:
        """Ratio of the peaks of memory."""
        return ratio(self.training.memory, self.original.memory)

    def entries(self) -> Iterator[Entry]:
        """The lines that `str` shows."""
        old, new = self.original, self.training
        yield Entry("FLOPs", before_and_after((old.flops, new.flops)), "  of a training step")
        yield Entry("parameters", before_and_after((old.parameters, new.parameters)))
        activations = before_and_after((old.activations, new.activations), "B")
        yield Entry("activations", activations, "  kept for the backward")
        memory = before_and_after((old.memory, new.memory), "B")
        yield Entry("memory", memory, "  peak of a step: state, gradients, optimizer, activations")

    def __str__(self) -> str:
        return as_text(self.entries())

    def to_json(self) -> dict[str, Any]:
        """Both steps and the ratios as plain data."""
        names = ("time", "flops", "parameters", "activations", "memory")
        return asdict(self) | {"ratios": {name: getattr(self, name) for name in names}}


@checked
def training_costs(
    model: nn.Module | Callable[[], nn.Module],
    pattern: str = "hierarchical",
    splits: Sequence[str] | str = (),
    heads: int | None = None,
    fanouts: Sequence[Fanout] | None = None,
    example_inputs: ExampleInputs | None = None,
    *,
    granularity: Granularity = "auto",
    optimizer: float = 1.0,
    recompute: Recompute | None = None,
) -> Costs:
    """What a training step will cost on the graph that `transform` would make of the same arguments.

    Nothing is built, and the model runs on fake tensors only. Operations are those that PyTorch runs on the model's
    device: on meta, attention is not fused, so that its matrices count as memory.

    Args:
        model: any module on any device, meta included, which stays as it is; or a factory of one.
        pattern: as for `transform` (default ``hierarchical``).
        splits: as for `transform`, but not ``auto`` (default none).
        heads: as for `transform` (default None).
        fanouts: as for `transform` (default None).
        example_inputs: costs are those at their shapes (default: those of a usual input that fits).
        granularity: as for `transform` (default ``auto``).
        optimizer: number of values that the optimizer keeps for each trained one (default 1): 1 for SGD with
            momentum, 2 for Adam.
        recompute: as for `transform` (default None).

    Raises:
        PatternError, SplitError, CaptureError: as `transform`; or no input is known, or fits.
    """
    if split_names(splits) == (AUTO,):
        raise PatternError("Costs are those of splits.", hint="choose_splits(...).costs are those of chosen ones")
    check_recompute(recompute)
    check_optimizer(optimizer)
    model = model_of(model)
    interface = known_interface(model, example_inputs)
    tree = head_tree(pattern, split_names(splits), heads, fanouts)
    captured = capture(model, tree.splits, example_inputs, granularity, interface=interface)
    cut = partition(captured, tree)
    with explained(model, interface):
        profiled = profile(captured, interface, example_inputs)
    return costs_of(captured, profiled, Levels.of(captured, cut), optimizer, recompute)


@dataclass(frozen=True, eq=False)
class Levels:
    """On which levels of a head tree the nodes of the train mode's graph lie, and the state, by name."""

    tree: HeadTree
    nodes: Mapping[fx.Node, int]
    state: Mapping[str, int]

    @classmethod
    def of(cls, captured: CollabGraphModule, cut: Partition) -> Levels:
        """Those of a partition."""
        return cls(cut.tree, cut.nodes[captured.modes.train], cut.state)

    @classmethod
    def flat(cls, captured: CollabGraphModule, profile: Profile) -> Levels:
        """Those of the original: one level."""
        return cls(HeadTree((), ()), dict.fromkeys(profile.nodes, 0), dict.fromkeys(state_bytes(captured, 0), 0))


def costs_of(
    captured: CollabGraphModule,
    profile: Profile,
    levels: Levels,
    optimizer: float = 1.0,
    recompute: Recompute | None = None,
) -> Costs:
    """The costs of the training graph of these levels, and of the captured original."""
    return Costs(
        step_cost(captured, profile, Levels.flat(captured, profile), optimizer),
        step_cost(captured, profile, levels, optimizer, recompute),
    )


def step_cost(
    captured: CollabGraphModule,
    profile: Profile,
    levels: Levels,
    optimizer: float = 1.0,
    recompute: Recompute | None = None,
) -> StepCost:
    """The cost of a training step of the training graph of these levels."""
    tree = levels.tree
    simulation = MemorySimulation(profile, tree, levels.nodes, recompute=recompute is not None)
    flops = 0
    for node, cost in profile.nodes.items():
        # recomputed whole, though a second pass of a branch ends once all that its backward needs is there
        forwards = 2 if recompute and levels.nodes[node] else 1
        flops += tree.branches(levels.nodes[node]) * (forwards * cost.forward_flops + cost.backward_flops)
    state = state_bytes(captured, optimizer)
    instances = {name: tree.branches(levels.state[name]) for name in state}
    return StepCost(
        flops=flops,
        parameters=sum(instances[name] * parameter.numel() for name, parameter in captured.named_parameters()),
        activations=simulation.activations,
        memory=round(sum(instances[name] * size for name, size in state.items())) + profile.inputs + simulation.peak,
    )


def state_bytes(captured: CollabGraphModule, optimizer: float) -> Mapping[str, float]:
    """Bytes of one instance of every parameter and buffer, with what the optimizer keeps for it."""
    trained = trained_bytes(captured)
    tensors = (*captured.named_parameters(), *captured.named_buffers())
    return {name: tensor.nbytes + optimizer * trained.get(name, 0) for name, tensor in tensors}


def trained_bytes(captured: CollabGraphModule) -> Mapping[str, int]:
    """Bytes of one instance of every parameter that requires a gradient."""
    return {name: parameter.nbytes for name, parameter in captured.named_parameters() if parameter.requires_grad}


def ratio(new: float, old: float) -> float:
    """``new`` to ``old``; 1 where both are 0."""
    return new / old if old else 1.0


def parameter_count(model: nn.Module) -> int:
    """The number of values in all parameters; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())
