"""The cost of a training step over a head tree, by the profile of the original alone: nothing is built.

Every node runs once a branch of its level. The instances of one node stand side by side, forward and backward, so
memory is found by playing the profile's allocations in that order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxcollab.codegen import CollabGraphModule
from fxcollab.costs.attribution import Moment, Phase
from fxcollab.costs.profile import Allocation, Profile
from fxcollab.partition.partition import Partition
from fxcollab.tree import HeadTree, Path


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
    """

    tree: HeadTree
    nodes: Mapping[fx.Node, int]
    state: Mapping[str, int]

    @classmethod
    def of(cls, captured: CollabGraphModule, cut: Partition) -> Placement:
        """That of a partition."""
        return cls(cut.tree, cut.nodes[captured.modes.train], cut.state)

    @classmethod
    def of_original(cls, captured: CollabGraphModule) -> Placement:
        """One head alone."""
        state = (*captured.named_parameters(), *captured.named_buffers())
        return cls(HeadTree((), ()), dict.fromkeys(captured.modes.train.nodes, 0), {name: 0 for name, _ in state})

    def branches(self, level: int) -> int:
        """How many instances there are of a level."""
        return math.prod(self.tree.fanouts[:level])


def step_cost(
    captured: CollabGraphModule,
    profile: Profile,
    placement: Placement,
    optimizer: float = 1.0,
    seconds: Mapping[fx.Node, float] | None = None,
) -> StepCost:
    """The cost of a step of the training graph that ``placement`` leads to.

    Args:
        captured: the captured original.
        profile: that of its train mode's graph.
        placement: what belongs to which level.
        optimizer: values that the optimizer holds for each trained one: 1 for SGD with momentum, 2 for Adam.
        seconds: what each node takes, where that was measured.
    """
    held = held_bytes(captured, optimizer).items()
    play = _Play(profile, placement)
    instances = {node: placement.branches(placement.nodes[node]) for node in profile.nodes}
    return StepCost(
        flops=sum(instances[node] * cost.flops for node, cost in profile.nodes.items()),
        parameters=sum(
            placement.branches(placement.state[name]) * tensor.numel() for name, tensor in captured.named_parameters()
        ),
        activations=play.activations,
        memory=round(sum(placement.branches(placement.state[name]) * size for name, size in held))
        + profile.inputs
        + play.peak,
        seconds=None if seconds is None else sum(instances[node] * each for node, each in seconds.items()),
    )


def held_bytes(captured: CollabGraphModule, optimizer: float) -> Mapping[str, float]:
    """Bytes of one instance of every parameter and buffer, with what the optimizer holds for it."""
    trained = trained_bytes(captured)
    tensors = (*captured.named_parameters(), *captured.named_buffers())
    return {name: tensor.nbytes + optimizer * trained.get(name, 0) for name, tensor in tensors}


def trained_bytes(captured: CollabGraphModule) -> Mapping[str, int]:
    """Bytes of one instance of every parameter that takes a gradient."""
    return {name: tensor.nbytes for name, tensor in captured.named_parameters() if tensor.requires_grad}


_Step = tuple[Phase, fx.Node, Path]


class _Play:
    """The allocations of a step over a head tree, in the order of its forward and backward.

    Attributes:
        activations: bytes that are kept between the forward and the backward.
        peak: the most bytes that are allocated at any time, in excess of what stands before the step.
    """

    def __init__(self, profile: Profile, placement: Placement) -> None:
        self._profile, self._levels, self._tree = profile, placement.nodes, placement.tree
        forward: list[_Step] = [("forward", n, path) for n in profile.nodes for path in self._paths(n)]
        backward: list[_Step] = [("backward", n, path) for n in profile.backward for path in self._paths(n)[::-1]]
        steps = [*forward, *backward]
        self._times = {step: time for time, step in enumerate(steps)}
        self._born, self._died, self._added = ([0] * (len(steps) + 1) for _ in range(3))
        for allocation in profile.allocations:
            self._place(allocation)
        live = self.peak = self.activations = 0
        for time, (phase, node, _) in enumerate(steps):
            if time == len(forward):
                self.activations = live
            cost = profile.nodes[node]
            inside = cost.forward_bytes if phase == "forward" else cost.backward_bytes
            self.peak = max(self.peak, live + max(inside, self._born[time] + self._added[time]))
            live += self._born[time] - self._died[time]

    def _paths(self, node: fx.Node) -> list[Path]:
        return list(self._tree.paths(self._levels[node]))

    def _place(self, allocation: Allocation) -> None:
        """When each instance of an allocation is made and freed."""
        phase, node = allocation.born
        level = self._levels[node]
        meets = self._levels[allocation.died[1]] if allocation.died is not None else level
        owners: set[Path] = set()
        for path in sorted(self._tree.paths(level), key=lambda path: self._times[phase, node, path]):
            birth = self._times[phase, node, path]
            if path[:meets] in owners:  # gradients of branches are added up where they meet
                self._added[birth] += allocation.bytes
                continue
            if meets < level:
                owners.add(path[:meets])
            self._born[birth] += allocation.bytes
            if allocation.died is not None:
                self._died[self._last(allocation.died, path[:meets])] += allocation.bytes

    def _last(self, moment: Moment, path: Path) -> int:
        """The last time of ``moment`` among the branches that descend from ``path``."""
        phase, node = moment
        descendants = (p for p in self._tree.paths(self._levels[node]) if p[: len(path)] == path)
        return max(self._times[phase, node, p] for p in descendants)
