"""Simulate the memory of a training step over a head tree, allocation by allocation, in the order in which it runs.

Branches run one after the other, forward and backward. With recompute each is freed after its forward, and made again
before its backward:

    forward   trunk, b0, b0_0, b0_1, b1, b1_0, b1_1
    backward  b1_1 again and back, b1_0 again and back, b1 again and back, b0_1 again and back, ..., trunk
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias, get_args

from torch import fx

from fxcollab.costs.attribution import Moment
from fxcollab.costs.profile import Allocation, Profile
from fxcollab.tree import HeadTree, Path

_Phase: TypeAlias = Literal["forward", "again", "backward"]
_Step: TypeAlias = tuple[_Phase, fx.Node, Path]
_PHASES: tuple[_Phase, ...] = get_args(_Phase)


class MemorySimulation:
    """The allocations of a step.

    Args:
        profile: that of the original.
        tree: the head tree.
        levels: the level of every node.
        recompute: whether branches are computed again in the backward pass.

    Attributes:
        activations: bytes that are kept between the forward and the backward.
        peak: the most bytes that are allocated at any time, in excess of what stands before the step.
    """

    def __init__(self, profile: Profile, tree: HeadTree, levels: Mapping[fx.Node, int], *, recompute: bool) -> None:
        self._profile, self._tree, self._levels, self._recompute = profile, tree, levels, recompute
        steps = list(self._steps())
        self._times = {step: time for time, step in enumerate(steps)}
        self._ends: dict[tuple[_Phase, Path], int] = {
            (phase, path): time for time, (phase, _, path) in enumerate(steps)
        }
        self._born, self._died, self._added = ([0] * (len(steps) + 1) for _ in range(3))
        for allocation in profile.allocations:
            self._place(allocation)
        forward = sum(phase == "forward" for phase, _, _ in steps)
        live = self.peak = self.activations = 0
        for time, (phase, node, _) in enumerate(steps):
            if time == forward:
                self.activations = live
            cost = profile.nodes[node]
            inside = cost.backward_bytes if phase == "backward" else cost.forward_bytes
            self.peak = max(self.peak, live + max(inside, self._born[time] + self._added[time]))
            live += self._born[time] - self._died[time]

    def _steps(self) -> Iterator[_Step]:
        branches = sorted(path for level in range(self._tree.depth + 1) for path in self._tree.paths(level))
        forward, backward = self._by_level(self._profile.nodes), self._by_level(self._profile.backward)
        for path in branches:
            yield from (("forward", node, path) for node in forward.get(len(path), ()))
        for path in reversed(branches):
            yield from (("again", node, path) for node in forward.get(len(path), ()) if path and self._recompute)
            yield from (("backward", node, path) for node in backward.get(len(path), ()))

    def _by_level(self, nodes: Iterable[fx.Node]) -> dict[int, list[fx.Node]]:
        found: dict[int, list[fx.Node]] = {}
        for node in nodes:
            found.setdefault(self._levels[node], []).append(node)
        return found

    def _paths(self, node: fx.Node) -> Iterator[Path]:
        return self._tree.paths(self._levels[node])

    def _place(self, allocation: Allocation) -> None:
        """When each instance of an allocation is made and freed."""
        phase, node = allocation.born
        level = self._levels[node]
        if self._recompute and phase == "forward" and level:
            for path in self._paths(node):
                self._place_twice(allocation, node, path)
            return
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
                death = self._last(allocation.died, path[:meets])
                self._died[max(death, self._held(allocation, path))] += allocation.bytes

    def _place_twice(self, allocation: Allocation, node: fx.Node, path: Path) -> None:
        """What a branch makes in its forward: freed at its end unless others read it, and made again."""
        self._born[self._times["forward", node, path]] += allocation.bytes
        self._born[self._times["again", node, path]] += allocation.bytes
        for death in self._deaths(allocation, path):
            self._died[death] += allocation.bytes

    def _deaths(self, allocation: Allocation, path: Path) -> Iterator[int]:
        """When what a branch makes in its forward is freed, in the first pass and in the second."""
        if allocation.died is None:  # what the step returns
            yield self._end(path)
            return
        phase, last = allocation.died
        inside = self._levels[last] == len(path)
        brief = inside and phase == "forward"
        held = self._held(allocation, path)
        yield held or (self._times["forward", last, path] if brief else self._ends["forward", path])
        if inside:
            yield self._times["again" if brief else "backward", last, path]
        else:
            yield self._ends["again", path]

    def _held(self, allocation: Allocation, path: Path) -> int:
        """Until when deeper branches hold it, to begin again from; 0 where they don't."""
        if not self._recompute:
            return 0
        users = (user for value in allocation.values for user in value.users)
        deeper = {self._levels[user] for user in users if self._levels[user] > len(path) and user.op != "output"}
        return max((self._end(reader) for level in deeper for reader in self._below(path, level)), default=0)

    def _end(self, path: Path) -> int:
        """The last step of a branch."""
        return max(self._ends.get((phase, path), 0) for phase in _PHASES)

    def _below(self, path: Path, level: int) -> Iterator[Path]:
        return (other for other in self._tree.paths(level) if other[: len(path)] == path)

    def _last(self, moment: Moment, path: Path) -> int:
        """The last time of ``moment`` among the branches that descend from ``path``."""
        phase, node = moment
        return max(self._times[phase, node, below] for below in self._below(path, self._levels[node]))
