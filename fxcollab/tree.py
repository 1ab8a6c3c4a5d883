"""The head tree: the one data structure behind all patterns.

A head tree is an ordered list of splits with their fan-outs. A *path* names one branch of one level by the
choices made at each split; a full path is a head. Names, factors and counts are functions of the tree:

    >>> tree = hierarchical(["layer2", "layer3"])
    >>> tree.heads
    4
    >>> [branch_name(path) for path in tree.paths(2)]
    ['b0_0', 'b0_1', 'b1_0', 'b1_1']
    >>> tree.factor(0, 2)
    0.25
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fxcollab.errors import PatternError, closest

Path = tuple[int, ...]
Pattern = Literal["multi-instance", "simple", "hierarchical"]
AUTO = "auto"
"""In the place of split names: let them be chosen."""
PATTERNS: tuple[Pattern, ...] = ("multi-instance", "simple", "hierarchical")

_BRANCH_NAME = re.compile(r"b\d+(_\d+)*")


@dataclass(frozen=True)
class HeadTree:
    """Ordered splits with their fan-outs.

    Attributes:
        splits: the split names along the data flow; empty for ``multi-instance``, whose one fan-out lies
            right behind the inputs.
        fanouts: how many branches each split makes, one entry a level.
    """

    splits: tuple[str, ...]
    fanouts: tuple[int, ...]

    @property
    def depth(self) -> int:
        """The number of levels below the trunk."""
        return len(self.fanouts)

    @property
    def heads(self) -> int:
        """The number of heads: the product of the fan-outs."""
        return math.prod(self.fanouts)

    def paths(self, level: int) -> Iterator[Path]:
        """The branches of ``level`` in path order; the trunk's is the empty path."""
        return itertools.product(*(range(fanout) for fanout in self.fanouts[:level]))

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
        path: list[int] = []
        for fanout in reversed(self.fanouts):
            head, choice = divmod(head, fanout)
            path.append(choice)
        return tuple(reversed(path))

    def heads_of(self, path: Path) -> list[int]:
        """The heads that descend from a branch, in order; the trunk's are all."""
        return [head for head in range(self.heads) if self.head_path(head)[: len(path)] == path]

    def factor(self, shallow: int, deep: int) -> float:
        """What a gradient is multiplied with on its way from level ``deep`` to ``shallow`` (equation 5)."""
        return 1.0 / math.prod(self.fanouts[shallow:deep])


def branch_name(path: Path) -> str:
    """The name of a branch: ``b1`` at level 1, ``b0_1`` at level 2."""
    return "b" + "_".join(map(str, path))


def parse_branch_name(name: str) -> Path | None:
    """The path that ``name`` stands for, or None where it names no branch."""
    return tuple(map(int, name[1:].split("_"))) if _BRANCH_NAME.fullmatch(name) else None


def multi_instance(heads: int = 2) -> HeadTree:
    """Independent instances of the whole network (figure 1 b)."""
    return HeadTree((), (_at_least_two(heads, "heads"),))


def simple(split: str, heads: int = 2) -> HeadTree:
    """One split, one branch a head (figure 1 c)."""
    return HeadTree((split,), (_at_least_two(heads, "heads"),))


def hierarchical(splits: Sequence[str], fanouts: Sequence[int] | None = None) -> HeadTree:
    """A tree over several splits (figure 1 d); binary unless ``fanouts`` says otherwise."""
    fanouts = (2,) * len(splits) if fanouts is None else tuple(fanouts)
    if len(fanouts) != len(splits):
        raise PatternError(
            f"{len(splits)} splits need {len(splits)} fan-outs, not {len(fanouts)}.",
            why=f"splits are {_listed(splits)} and fan-outs {_listed(fanouts)}; every split has one fan-out",
            hint=f"for example fanouts={(2,) * len(splits)} (--fanouts {','.join('2' * len(splits))})",
        )
    return HeadTree(tuple(splits), tuple(_at_least_two(fanout, "a fan-out") for fanout in fanouts))


def head_tree(
    pattern: str, splits: Sequence[str] = (), heads: int | None = None, fanouts: Sequence[int] | None = None
) -> HeadTree:
    """The tree of a named pattern.

    Args:
        pattern: ``multi-instance``, ``simple`` or ``hierarchical``.
        splits: none, one, or at least one name, in this order of patterns.
        heads: H of ``multi-instance`` and ``simple``; 2 unless said.
        fanouts: one number a split, for ``hierarchical`` only; 2 each unless said.

    Raises:
        PatternError: the arguments don't fit the pattern.
    """
    if isinstance(fanouts, int):
        raise PatternError(f"Fan-outs are {fanouts}, not a sequence.", hint=f"give one for each split: ({fanouts},)")
    splits = tuple(splits)
    repeated = sorted({split for split in splits if splits.count(split) > 1})
    if repeated:
        raise PatternError(f"Split {_listed(repeated)} is named twice.", hint="name every split once")
    if pattern not in PATTERNS:
        near = closest(pattern, PATTERNS, 1)
        raise PatternError(
            f"There is no pattern {pattern!r}.",
            hint=f"{f'did you mean {near}? ' if near else ''}There are {', '.join(PATTERNS)}.",
        )
    if fanouts is not None and pattern != "hierarchical":
        raise PatternError(
            f"Pattern {pattern!r} takes no fan-outs.", hint="give heads=... (--heads), or use pattern 'hierarchical'"
        )
    if pattern == "multi-instance":
        if splits:
            raise PatternError(
                f"Pattern 'multi-instance' takes no splits, but {_listed(splits)} is given.",
                why="its heads share nothing but the inputs",
                hint="use pattern 'simple' or 'hierarchical' to share what lies before a split",
            )
        return multi_instance(2 if heads is None else heads)
    if not splits:
        raise PatternError(
            f"Pattern {pattern!r} needs {'one split' if pattern == 'simple' else 'at least one split'}.",
            hint="name the module after which the heads begin, for example splits=['layer2'] (--splits layer2)",
        )
    if pattern == "simple":
        if len(splits) > 1:
            raise PatternError(
                f"Pattern 'simple' takes one split, but {_listed(splits)} is given.",
                hint="use pattern 'hierarchical' for several, or 'a+b' for one split at two values",
            )
        return simple(splits[0], 2 if heads is None else heads)
    tree = hierarchical(splits, fanouts)
    if heads is not None and heads != tree.heads:
        raise PatternError(
            f"{len(splits)} splits with fan-outs {_listed(tree.fanouts)} make {tree.heads} heads, not {heads}.",
            hint=f"leave heads out, or give fanouts whose product is {heads}",
        )
    return tree


def split_names(splits: Sequence[str] | str) -> tuple[str, ...]:
    """Splits as names; a text lists them with commas."""
    names = [name.strip() for name in splits.split(",")] if isinstance(splits, str) else list(splits)
    return tuple(name for name in names if name)


def fanouts_to_choose(
    pattern: str, heads: int | None = None, fanouts: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The fan-outs of a head tree whose splits are still to be chosen; two splits unless heads say otherwise.

    Raises:
        PatternError: the arguments don't fit the pattern, or it has no splits to choose.
    """
    if pattern == "hierarchical" and heads is not None and fanouts is None and heads & (heads - 1):
        raise PatternError(
            f"{heads} heads make no binary tree.",
            why="splits are to be chosen, and each of them doubles the branches",
            hint=f"give fan-outs whose product is {heads}: fanouts=({heads},) (--fanouts {heads})",
        )
    count = 1 if pattern != "hierarchical" else 2 if heads is None else max(heads, 2).bit_length() - 1
    if pattern == "hierarchical" and isinstance(fanouts, Sequence):
        count = len(fanouts)
    return head_tree(pattern, [AUTO, *(f"{AUTO} {level}" for level in range(2, count + 1))], heads, fanouts).fanouts


def _at_least_two(count: int, what: str) -> int:
    if not isinstance(count, int):
        raise PatternError(f"{what.capitalize()} is {count!r}, not a whole number.", hint="give 2 or more")
    if count < 2:
        raise PatternError(
            f"Collaborative learning needs at least 2 heads, but {what} is {count}.",
            why="a head learns from the others",
            hint="give 2 or more",
        )
    return count


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items)) or "none"
