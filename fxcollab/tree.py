"""The head tree: the one data structure behind all patterns.

A head tree is an ordered list of splits with their fan-outs. A *path* identifies a branch by the number of the child
at each split; a full path is a head. Names, factors and counts are functions of the tree:

    >>> tree = hierarchical(["layer2", "layer3"], (2, (2, 1)))
    >>> tree.heads
    3
    >>> [branch_name(path) for path in tree.paths(2)]
    ['b0_0', 'b0_1', 'b1_0']
    >>> tree.factor((), (0,))
    0.6666666666666666
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fxcollab.arguments import checked
from fxcollab.errors import LimitError, PatternError
from fxcollab.limits import MOST_HEADS, MOST_LEVELS, check_count, check_name, number

Path = tuple[int, ...]
Fanout = int | tuple[int, ...]
"""How many branches a split makes: in every branch alike, or one number for each branch, in path order."""

_BRANCH_NAME = re.compile(rf"b{(digits := '(?:0|[1-9][0-9]{0,3})')}(?:_{digits}){{0,{MOST_LEVELS - 1}}}")


@dataclass(frozen=True)
class HeadTree:
    """Ordered splits with their fan-outs.

    Attributes:
        splits: the split names along the data flow; empty for ``multi-instance``, whose one fan-out lies
            right behind the inputs.
        fanouts: how many branches each split makes, one entry a level: ``(2, (2, 1))`` splits only the first of two
            branches again.
    """

    splits: tuple[str, ...]
    fanouts: tuple[Fanout, ...]

    @classmethod
    def from_heads(cls, splits: Sequence[str], heads: Sequence[Path]) -> HeadTree:
        """The tree whose heads have these full paths, in path order.

        Raises:
            PatternError: they are not the heads of one tree.
        """
        paths: list[Path] = [()]
        fanouts: list[Fanout] = []
        for level in range(len(heads[0])):
            choices: dict[Path, set[int]] = {}
            for head in heads:
                choices.setdefault(head[:level], set()).add(head[level])
            counts = tuple(len(choices.get(path, ())) for path in paths)
            fanouts.append(counts[0] if len(set(counts)) == 1 else counts)
            paths = _split(paths, counts)
        if paths != list(heads):
            names = ", ".join(branch_name(head) for head in heads[:6])
            raise PatternError(
                f"The branches {names} are not the heads of one tree.",
                why="some are missing",
                hint="name all heads, in order, each by its branches from the first split on: (0, 0), (0, 1), (1, 0)",
            )
        return cls(tuple(splits), tuple(fanouts))

    @property
    def depth(self) -> int:
        """The number of levels below the trunk."""
        return len(self.fanouts)

    @property
    def heads(self) -> int:
        """The number of heads: the branches of the deepest level."""
        return self.branches(self.depth)

    def paths(self, level: int) -> Iterator[Path]:
        """The branches of ``level`` in path order; the trunk's is the empty path."""
        paths: list[Path] = [()]
        for fanout in self.fanouts[:level]:
            paths = _split(paths, fanout)
        return iter(paths)

    def branches(self, level: int) -> int:
        """The number of branches of ``level``."""
        return sum(1 for _ in self.paths(level))

    def children(self, path: Path) -> Iterator[Path]:
        """The branches that the next split makes in a branch; none behind the last split."""
        if len(path) == self.depth:
            return iter(())
        return (child for child in self.paths(len(path) + 1) if child[:-1] == path)

    def peers(self) -> Iterator[Path]:
        """Every branch that holds peers: of all levels, those whose path is not all zeros."""
        return (path for level in range(1, self.depth + 1) for path in self.paths(level) if any(path))

    def head_path(self, head: int) -> Path:
        """The full path of ``head``; heads count in path order, head 0 is the path of zeros."""
        if not 0 <= head < self.heads:
            raise PatternError(
                f"There is no head {head}.",
                why=f"the tree has {self.heads} heads",
                hint=f"choose one of 0 to {self.heads - 1}",
            )
        return next(itertools.islice(self.paths(self.depth), head, None))

    def heads_of(self, path: Path) -> list[int]:
        """The heads that descend from a branch, in order; the trunk's are all."""
        return [head for head, full in enumerate(self.paths(self.depth)) if full[: len(path)] == path]

    def factor(self, branch: Path, reader: Path) -> float:
        """The factor of the rescale through which branch ``reader`` reads a value of ``branch`` (equation 5).

        It is the reader's share of the branch's heads, so that gradients are the mean over these heads (equation 6).
        """
        return self._heads_behind[reader] / self._heads_behind[branch]

    @cached_property
    def _heads_behind(self) -> Counter[Path]:
        """How many heads descend from each branch."""
        return Counter(full[:level] for full in self.paths(self.depth) for level in range(self.depth + 1))


def _split(paths: Sequence[Path], fanout: Fanout) -> list[Path]:
    """The branches that a split makes in each of a level's branches."""
    counts = (fanout,) * len(paths) if isinstance(fanout, int) else fanout
    return [(*path, choice) for path, count in zip(paths, counts, strict=True) for choice in range(count)]


def branch_name(path: Path) -> str:
    """The name of a branch: ``b1`` at level 1, ``b0_1`` at level 2."""
    return "b" + "_".join(map(str, path))


def parse_branch_name(name: str) -> Path | None:
    """The path that ``name`` stands for, or None where it names no branch."""
    return tuple(map(int, name[1:].split("_"))) if _BRANCH_NAME.fullmatch(name) else None


@checked
def original_name(name: str, *, peers: str = "peers") -> str:
    """The name that a parameter, buffer or module of a training model has in the original.

    ``peers.b1.layer3.0.conv1.weight`` is ``layer3.0.conv1.weight``; a name of the trunk or of head 0 is its own.

    Args:
        name: as in the training model's state dict.
        peers: the name under which peers live.
    """
    return branch_and_name(name, peers)[1]


def branch_and_name(name: str, peers: str) -> tuple[Path, str]:
    """The branch whose state a name of a training model means, () for trunk and head 0, and its `original_name`."""
    first, _, rest = name.partition(".")
    branch, _, inner = rest.partition(".")
    path = parse_branch_name(branch) if first == peers else None
    return (path, inner) if path is not None and inner and branch == branch_name(path) else ((), name)


def multi_instance(heads: int = 2) -> HeadTree:
    """Independent instances of the whole network (figure 1 b)."""
    return HeadTree((), (_count(_at_least_two(heads, "heads"), 1),))


def hierarchical(splits: Sequence[str], fanouts: Sequence[Fanout] | None = None) -> HeadTree:
    """A tree over several splits (figure 1 d); binary by default."""
    check_count(len(splits), MOST_LEVELS, "splits", "name fewer, or join those that belong together: a+b")
    for split in splits:
        check_name(split, "a split")
    fanouts = (2,) * len(splits) if fanouts is None else tuple(fanouts)
    if len(fanouts) != len(splits):
        raise PatternError(
            f"{len(splits)} splits need {len(splits)} fan-outs, not {len(fanouts)}.",
            why=f"splits are {_listed(splits)} and fan-outs {_listed(fanouts)}; every split has one fan-out",
            hint=f"for example fanouts={(2,) * len(splits)} (--fanouts {','.join('2' * len(splits))})",
        )
    checked: list[Fanout] = []
    branches = 1
    for fanout in fanouts:
        checked.append(_checked_fanout(fanout, branches))
        branches = _count(checked[-1], branches)
    return HeadTree(tuple(splits), tuple(checked))


def _count(fanout: Fanout, branches: int) -> int:
    """How many branches a split makes of so many."""
    count = fanout * branches if isinstance(fanout, int) else sum(fanout)
    if count > MOST_HEADS:
        raise LimitError(
            f"A tree of {number(count)} heads is too large.",
            why=f"every head is an instance of the network; at most {MOST_HEADS:,} are made",
            hint="give smaller fan-outs, or fewer splits",
        )
    return count


def _checked_fanout(fanout: Any, branches: int) -> Fanout:
    """One number for all branches of a level where all are equal, else one for each of them."""
    if not isinstance(fanout, Sequence) or isinstance(fanout, str):
        return _at_least_two(fanout, "a fan-out")
    each = tuple(fanout)
    if len(each) != branches or not all(isinstance(count, int) and count >= 1 for count in each) or max(each) < 2:
        raise PatternError(
            f"Fan-outs {each} don't fit a level of {branches} branches.",
            why="there is one number for each branch in path order, at least 1, and one of them is 2 or more",
            hint=f"for example {(2, *(1,) * (branches - 1))}",
        )
    return each[0] if len(set(each)) == 1 else each


def ladder(splits: Sequence[str]) -> HeadTree:
    """At every split only head 0's branch splits again, in two: K splits make K + 1 heads."""
    return hierarchical(splits, [(2, *(1,) * level) if level else 2 for level in range(len(splits))])


def _at_least_two(count: Any, what: str) -> int:
    if not isinstance(count, int):
        raise PatternError(f"{what.capitalize()} is {count!r}, not a whole number.", hint="give 2 or more")
    if count < 2:
        raise PatternError(
            f"Collaborative learning needs at least 2 heads, but {what} is {count}.",
            why="a head learns from the others",
            hint="give 2 or more",
        )
    return int(count)


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items)) or "none"
