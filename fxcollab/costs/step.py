"""The cost of a training step over a head tree, by the profile of the original alone: nothing is built.

Every node runs once a branch of its level; where branches are computed again, its forward runs twice. Memory is found
by simulating the profile's allocations in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxcollab.analysis.partition import Partition
from fxcollab.codegen.branches import Recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.costs.attribution import Moment, Phase
from fxcollab.costs.memory import MemorySimulation
from fxcollab.costs.profile import Profile
from fxcollab.tree import HeadTree


@dataclass(frozen=True)
class StepCost:
    """What one training step costs.

    Attributes:
        flops: floating point operations, forward and backward.
        parameters: values in all parameters, peers included.
        activations: bytes that are kept between the forward and the backward.
        memory: bytes at the peak: state, gradients, the optimizer's state, activations and the inputs.
        seconds: of the forward and the backward; None where nothing was measured.
    """

    flops: int
    parameters: int
    activations: int
    memory: int
    seconds: float | None = None


@dataclass(frozen=True, eq=False)
class Placement:
    """Where everything stands in a head tree, built or not.

    Attributes:
        tree: the head tree.
        nodes: the level of every node of the train mode's graph.
        state: the level of every parameter and buffer, by name.
        recompute: what is computed again in the backward pass.
    """

    tree: HeadTree
    nodes: Mapping[fx.Node, int]
    state: Mapping[str, int]
    recompute: Recompute | None = None

    @classmethod
    def of(cls, captured: CollabGraphModule, cut: Partition, recompute: Recompute | None = None) -> Placement:
        """That of a partition."""
        return cls(cut.tree, cut.nodes[captured.modes.train], cut.state, recompute)

    @classmethod
    def of_original(cls, captured: CollabGraphModule) -> Placement:
        """One head alone."""
        state = (*captured.named_parameters(), *captured.named_buffers())
        return cls(HeadTree((), ()), dict.fromkeys(captured.modes.train.nodes, 0), {name: 0 for name, _ in state})

    def branches(self, level: int) -> int:
        """How many instances there are of a level."""
        return self.tree.branches(level)

    def runs(self, phase: Phase, node: fx.Node) -> int:
        """How often a phase of a node is run in a step.

        A second pass of a branch counts whole, though it ends once all that its backward needs is there: what comes
        after, as a rule the last product of a head, is not computed again.
        """
        level = self.nodes[node]
        return self.branches(level) * (2 if phase == "forward" and level and self.recompute else 1)


def step_cost(
    captured: CollabGraphModule,
    profile: Profile,
    placement: Placement,
    optimizer: float = 1.0,
    seconds: Mapping[Moment, float] | None = None,
) -> StepCost:
    """The cost of a step of the training graph that ``placement`` leads to.

    Args:
        captured: the captured original.
        profile: that of its train mode's graph.
        placement: what belongs to which level.
        optimizer: values that the optimizer holds for each trained one: 1 for SGD with momentum, 2 for Adam.
        seconds: what each node takes, forward and backward, where that was measured.
    """
    held = held_bytes(captured, optimizer).items()
    simulation = MemorySimulation(profile, placement.tree, placement.nodes, recompute=placement.recompute is not None)
    return StepCost(
        flops=sum(
            placement.runs("forward", node) * cost.forward_flops
            + placement.runs("backward", node) * cost.backward_flops
            for node, cost in profile.nodes.items()
        ),
        parameters=sum(
            placement.branches(placement.state[name]) * tensor.numel() for name, tensor in captured.named_parameters()
        ),
        activations=simulation.activations,
        memory=round(sum(placement.branches(placement.state[name]) * size for name, size in held))
        + profile.inputs
        + simulation.peak,
        seconds=None
        if seconds is None
        else sum(placement.runs(phase, node) * each for (phase, node), each in seconds.items()),
    )


def held_bytes(captured: CollabGraphModule, optimizer: float) -> Mapping[str, float]:
    """Bytes of one instance of every parameter and buffer, with what the optimizer holds for it."""
    trained = trained_bytes(captured)
    tensors = (*captured.named_parameters(), *captured.named_buffers())
    return {name: tensor.nbytes + optimizer * trained.get(name, 0) for name, tensor in tensors}


def trained_bytes(captured: CollabGraphModule) -> Mapping[str, int]:
    """Bytes of one instance of every parameter that takes a gradient."""
    return {name: tensor.nbytes for name, tensor in captured.named_parameters() if tensor.requires_grad}
