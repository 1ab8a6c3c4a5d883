"""A way to split a model that may be chosen, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

from fxcollab.splits.candidates import Candidate
from fxcollab.tree import Fanout


@dataclass(frozen=True)
class Option:
    """Splits for a head tree that was asked for.

    Attributes:
        cuts: the candidates, along the data flow.
        fanouts: how many branches each makes.
        time: of a training step, as a ratio to the original's: by FLOPs, or by seconds where they were measured.
    """

    cuts: tuple[Candidate, ...]
    fanouts: tuple[Fanout, ...]
    time: float

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits' names."""
        return tuple(cut.name for cut in self.cuts)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The part of one head's forward operations that lies on each level, the trunk first; 1 in all."""
        edges = (0.0, *(cut.share for cut in self.cuts), 1.0)
        return tuple(deep - shallow for shallow, deep in pairwise(edges))

    @property
    def ends_stages(self) -> bool:
        """Whether a stage ends at every cut."""
        return all(cut.ends_stage for cut in self.cuts)


OptionScore: TypeAlias = Callable[[Option], float]
"""How good an option is; more is better."""


def evenness(option: Option) -> float:
    """How evenly a head's work lies on the levels: ``exp`` of the shares' entropy, from 1 to the number of levels.

    The paper finds (section 4) that sharing in a hierarchy beats sharing at one point, and that heads need room to
    differ: the earlier a split, the more diverse the heads, and the dearer. A level with little work is hardly a
    level; where all do the same work, the tree makes most of its depth, and neither sharing nor diversity is bought
    at the expense of the other. Of ResNet-50's ends of stages this is highest at the paper's ``layer2`` and
    ``layer3``, of its CIFAR networks after the first and the second block.
    """
    return math.exp(-sum(share * math.log(share) for share in option.shares if share > 0))
