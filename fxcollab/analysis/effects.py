"""What the nodes of a captured graph do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True)
class Effects:
    """What one node does.

    Attributes:
        writes: inputs whose storage is written, or whose lists and dicts are changed.
        shares: inputs whose storage the result may share.
        asked: inputs about which a function asks: for others it may write into these, or return one.
        reads: names of the model's tensors that are read without being inputs or registered in the module that is
            called, each with whether a copy of that module reads a copy of it. Those registered there are among them
            if a copy wouldn't, or if other nodes read them too and the module would not read another tensor that
            was registered in the place of it.
        changes: names of the model's tensors that are written, however they are reached.
        random: whether random numbers are drawn.
        literals: whether a list or dict is changed that stands in the graph, and is made anew for every call.
        flops: floating point operations, as ``FlopCounterMode`` computes them; the most of all runs.
        plain: whether a call returns nothing that could carry a gradient: numbers, sizes, types.
        certain: False where the node could not be run.
    """

    writes: frozenset[fx.Node] = frozenset()
    shares: frozenset[fx.Node] = frozenset()
    asked: frozenset[fx.Node] = frozenset()
    reads: frozenset[tuple[str, bool]] = frozenset()
    changes: frozenset[str] = frozenset()
    random: bool = False
    literals: bool = False
    flops: int = 0
    plain: bool = False
    certain: bool = True

    def __or__(self, other: Effects) -> Effects:
        """What either does."""
        return Effects(
            self.writes | other.writes,
            self.shares | other.shares,
            self.asked | other.asked,
            self.reads | other.reads,
            self.changes | other.changes,
            self.random or other.random,
            self.literals or other.literals,
            max(self.flops, other.flops),
            self.plain and other.plain,
            self.certain and other.certain,
        )


@dataclass(frozen=True, eq=False)
class Observation:
    """The effects of all nodes of a captured model.

    Attributes:
        effects: by node.
        changed: names of attributes that a call of the model changes, such as ``features``.
        written_by_modes: names of state that ``train()`` of opened modules writes.
        evaluation: the effects of the nodes of eval mode in that mode alone.
        counts: whether a call in eval mode changes attributes of modules; known where it has guards.
    """

    effects: Mapping[fx.Node, Effects]
    changed: frozenset[str] = frozenset()
    written_by_modes: frozenset[str] = frozenset()
    evaluation: Mapping[fx.Node, Effects] = field(default_factory=dict)
    counts: bool = False

    def of(self, node: fx.Node) -> Effects:
        """What ``node`` does."""
        return self.effects[node]
