"""Simulate the memory of a training step over a head tree, allocation by allocation, in the order in which it runs.

Branches run one after the other, forward and backward. With recompute each is freed after its forward, and computed
again before its backward:

    forward   trunk, b0, b0_0, b0_1, b1, b1_0, b1_1
    backward  b1_1 again and back, b1_0 again and back, b1 again and back, b0_1 again and back, ..., trunk
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

from torch import fx

from fxcollab.costs.profile import Allocation, Moment, Profile
from fxcollab.tree import HeadTree, Path

_Step: TypeAlias = tuple[Literal["forward", "again", "backward"], fx.Node, Path]
_Lifetime: TypeAlias = tuple[int, int | None]
"""The steps in which an instance of an allocation is made and freed; None where it outlives the last."""


class MemorySimulation:
    """The memory of a step, from the profile of the original and the level of every node.

    Attributes:
        activations: bytes that are kept between the forward and the backward.
        peak: the most bytes that are allocated at any time, beyond those allocated before the step.
    """

    def __init__(self, profile: Profile, tree: HeadTree, levels: Mapping[fx.Node, int], *, recompute: bool) -> None:
        self._profile, self._tree, self._levels, self._recompute = profile, tree, levels, recompute
        steps = list(self._steps())
        self._times = {step: time for time, step in enumerate(steps)}
        self._ends: dict[tuple[str, Path], int] = {(phase, path): time for time, (phase, _, path) in enumerate(steps)}
        made, freed = [0] * len(steps), [0] * len(steps)
        for allocation in profile.allocations:
            for birth, death in self._lifetimes(allocation):
                made[birth] += allocation.bytes
                if death is not None:
                    freed[death] += allocation.bytes
        forward = sum(phase == "forward" for phase, _, _ in steps)
        live = self.peak = self.activations = 0
        for time, (phase, node, _) in enumerate(steps):
            if time == forward:
                self.activations = live
            cost = profile.nodes[node]
            inside = cost.backward_bytes if phase == "backward" else cost.forward_bytes
            self.peak = max(self.peak, live + max(inside, made[time]))
            live += made[time] - freed[time]

    def _steps(self) -> Iterator[_Step]:
        branches = sorted(path for level in range(self._tree.depth + 1) for path in self._tree.paths(level))
        forward, backward = self._by_level(self._profile.nodes), self._by_level(self._profile.backward)
        for path in branches:
            yield from (("forward", node, path) for node in forward[len(path)])
        for path in reversed(branches):
            if path and self._recompute:
                yield from (("again", node, path) for node in forward[len(path)])
            yield from (("backward", node, path) for node in backward[len(path)])

    def _by_level(self, nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
        found: list[list[fx.Node]] = [[] for _ in range(self._tree.depth + 1)]
        for node in nodes:
            found[self._levels[node]].append(node)
        return found

    def _lifetimes(self, allocation: Allocation) -> Iterator[_Lifetime]:
        """One or two for each instance of the node that allocates it."""
        phase, node = allocation.born
        level = self._levels[node]
        if self._recompute and phase == "forward" and level:
            for path in self._tree.paths(level):
                yield from self._lifetimes_in_recomputed(allocation, path)
            return
        meets = self._levels[allocation.died[1]] if allocation.died else level
        owners: set[Path] = set()
        for birth, path in sorted((self._times[phase, node, path], path) for path in self._tree.paths(level)):
            if path[:meets] in owners:  # gradients of branches are summed where they meet
                yield birth, birth
                continue
            owners.add(path[:meets])
            death = None
            if allocation.died:
                death = max(self._last(allocation.died, path[:meets]), self._last_reader(allocation, path))
            yield birth, death

    def _lifetimes_in_recomputed(self, allocation: Allocation, path: Path) -> Iterator[_Lifetime]:
        """In the first forward of a branch, freed at its end unless others read it, and in the second."""
        node = allocation.born[1]
        first, second = self._times["forward", node, path], self._times["again", node, path]
        if allocation.died is None:  # what the step returns
            yield first, self._end(path)
            yield second, None
            return
        phase, last = allocation.died
        inside = self._levels[last] == len(path)
        brief = inside and phase == "forward"
        freed = self._times["forward", last, path] if brief else self._ends["forward", path]
        yield first, self._last_reader(allocation, path) or freed
        if inside:
            yield second, self._times["again" if brief else "backward", last, path]
        else:
            yield second, self._ends["again", path]

    def _last_reader(self, allocation: Allocation, path: Path) -> int:
        """Until when deeper branches need it to be computed again; 0 where they don't."""
        if not self._recompute:
            return 0
        users = (user for value in allocation.values for user in value.users)
        deeper = {self._levels[user] for user in users if self._levels[user] > len(path) and user.op != "output"}
        return max((self._end(reader) for level in deeper for reader in self._below(path, level)), default=0)

    def _end(self, path: Path) -> int:
        """The last step of a branch."""
        return max(self._ends.get((phase, path), 0) for phase in ("forward", "again", "backward"))

    def _below(self, path: Path, level: int) -> Iterator[Path]:
        return (other for other in self._tree.paths(level) if other[: len(path)] == path)

    def _last(self, moment: Moment, path: Path) -> int:
        """The last time of ``moment`` among the branches that descend from ``path``."""
        phase, node = moment
        return max(self._times[phase, node, below] for below in self._below(path, self._levels[node]))
