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
from fxcollab.costs.profile import Allocation, Moment, Phase, Profile
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
    """

    flops: int
    parameters: int
    activations: int
    memory: int


def step_cost(captured: CollabGraphModule, cut: Partition, profile: Profile, optimizer: float = 1.0) -> StepCost:
    """The cost of a step of the training graph that ``cut`` leads to.

    Args:
        captured: the captured original.
        cut: its partition.
        profile: that of its train mode's graph.
        optimizer: values that the optimizer holds for each trained one: 1 for SGD with momentum, 2 for Adam.
    """
    levels = cut.nodes[captured.modes.train]
    branches = [math.prod(cut.tree.fanouts[:level]) for level in range(cut.tree.depth + 1)]
    parameters = {name: branches[cut.state[name]] for name, _ in captured.named_parameters()}
    buffers = {name: branches[cut.state[name]] for name, _ in captured.named_buffers()}
    tensors = {**dict(captured.named_parameters()), **dict(captured.named_buffers())}
    held = sum(count * tensors[name].nbytes for name, count in {**parameters, **buffers}.items())
    trained = sum(count * tensors[name].nbytes for name, count in parameters.items() if tensors[name].requires_grad)
    play = _Play(profile, levels, cut.tree)
    return StepCost(
        flops=sum(branches[levels[node]] * cost.flops for node, cost in profile.nodes.items()),
        parameters=sum(count * tensors[name].numel() for name, count in parameters.items()),
        activations=play.activations,
        memory=held + round(optimizer * trained) + profile.inputs + play.peak,
    )


_Step = tuple[Phase, fx.Node, Path]


class _Play:
    """The allocations of a step over a head tree, in the order of its forward and backward.

    Attributes:
        activations: bytes that are kept between the forward and the backward.
        peak: the most bytes that are allocated at any time, in excess of what stands before the step.
    """

    def __init__(self, profile: Profile, levels: Mapping[fx.Node, int], tree: HeadTree) -> None:
        self._profile, self._levels, self._tree = profile, levels, tree
        forward: list[_Step] = [("forward", n, path) for n in profile.nodes for path in tree.paths(levels[n])]
        backward: list[_Step] = [
            ("backward", n, path) for n in profile.backward for path in reversed(list(tree.paths(levels[n])))
        ]
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
