"""The difference between a training graph and its inference graph, as data; everything else is a view of it.

The inference graph is the training graph without what was added, so nothing is matched: every node's
provenance says whether it is shared, a clone, or inserted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from fxcollab.proof.report import Report
from fxcollab.provenance import Kind
from fxcollab.tree import HeadTree, Path, branch_name

Change: TypeAlias = Literal["shared", "own", "cloned", "rescaled", "copied", "state"]
"""How a node differs. ``shared``: of the trunk, once for all heads. ``own``: head 0's instance of what lies behind
a split. ``cloned``: another head's. ``rescaled``, ``copied``, ``state``: inserted. Inference has the first two."""

MEANINGS: Mapping[Literal[Change, "rewired"], tuple[str, str]] = {
    "shared": ("=", "shared by all heads"),
    "own": ("=", "kept for inference, behind a split"),
    "cloned": ("+", "another head's instance"),
    "rescaled": ("~", "gradient scaled"),
    "copied": ("!", "copy before a write"),
    "state": (".", "a shallower parameter, passed in"),
    "rewired": (">", "rewired, in training only"),
}
"""For every kind a sign of one character, and what it means. ``rewired`` is said beside one of the others."""


@dataclass(frozen=True)
class DiffNode:
    """A node of the training graph.

    Attributes:
        name: in the training graph.
        kind: what the rewrite did, as in `Provenance`.
        counterpart: the inference graph's node that it is an instance of; None where it was inserted.
        origin: the captured node that it was made from, also for inserted nodes.
        path: of the branch that it belongs to; empty for the trunk.
        op: as in ``torch.fx``: ``call_module`` and so on.
        label: what it does, in a word: the module's class, the function's name.
        target: the module's path, the function, of the original.
        module: the path of the opened module in whose forward it stands; "" for the root's.
        inputs: the names of the nodes that it reads.
        factor: what a rescale multiplies gradients with; None elsewhere.
        shape, dtype: of its value; None where it is not a single tensor, or unknown.
        parameters: values in the parameters of this instance.
        new_parameters: those of them that no earlier node has, so that sums count every parameter once.
        flops: of a forward; None where nothing is known.
        source: the line of the user's code that made it, where that was recorded.
        rewired: whether the inference graph has it, reading other values.
    """

    name: str
    kind: Kind
    counterpart: str | None
    origin: str
    path: Path
    op: str
    label: str
    target: str
    module: str
    inputs: tuple[str, ...]
    factor: float | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    parameters: int = 0
    new_parameters: int = 0
    flops: int | None = None
    source: str | None = None
    rewired: bool = False

    @property
    def change(self) -> Change:
        """How it differs from the inference graph's node."""
        if self.kind == "clone":
            return "cloned" if any(self.path) else "own"
        inserted: Mapping[Kind, Change] = {"rescale": "rescaled", "copy": "copied", "state": "state"}
        return inserted.get(self.kind, "shared")

    @property
    def glyph(self) -> str:
        """One character for it."""
        return MEANINGS[self.change][0]

    @property
    def branch(self) -> str:
        """The name of its branch; "" for the trunk."""
        return branch_name(self.path) if self.path else ""

    @property
    def in_inference(self) -> bool:
        """Whether the inference graph of head 0 has it."""
        return self.change in ("shared", "own")


@dataclass(frozen=True)
class DiffData:
    """A training graph beside its inference graph: what every view shows.

    Attributes:
        pattern: the pattern's name.
        tree: splits and fan-outs.
        training: whether this is train mode's graph.
        model: what it is called.
        parameters: values in those of the original, and of the training model.
        flops: of a training step of both; None where they are unknown.
        nodes: of the training graph, in its order.
        inputs: on which shapes and FLOPs were counted, as text; None where they are unknown.
        unknown: why shapes are unknown; None where they are known.
        limitations: what of the original is not preserved, one sentence each.
        report: what `verify` found, for views that show it; None where it did not run.
    """

    pattern: str
    tree: HeadTree
    training: bool
    model: str
    parameters: tuple[int, int]
    flops: tuple[int, int] | None
    nodes: tuple[DiffNode, ...]
    inputs: str | None = None
    unknown: str | None = None
    limitations: tuple[str, ...] = ()
    report: Report | None = None

    @property
    def title(self) -> str:
        """What it is, in a line."""
        mode = "" if self.training else ", eval mode"
        return f"{self.model}: training graph, {self.tree.heads} heads{mode}"

    @property
    def facts(self) -> str:
        """What became of the model, in a line."""
        before, after = self.parameters
        parts = [
            f"inference graph = the original, {self.count('shared', 'own')} nodes, untouched",
            f"{short(before)} to {short(after)} parameters",
        ]
        if self.flops and self.flops[0]:
            parts[1] += f", {self.flops[1] / self.flops[0]:.2f}x FLOPs"
        if self.tree.splits:
            parts.append(f"split at {', '.join(self.tree.splits)}")
        return "; ".join(parts)

    @cached_property
    def by_name(self) -> Mapping[str, DiffNode]:
        """Nodes by their names."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def instances(self) -> Mapping[str, tuple[DiffNode, ...]]:
        """For each node of the inference graph its instances, head 0's or the trunk's first."""
        found: dict[str, list[DiffNode]] = {}
        for node in self.nodes:
            if node.counterpart is not None:
                found.setdefault(node.counterpart, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def of_branch(self, path: Path) -> tuple[DiffNode, ...]:
        """The nodes of one branch, in order."""
        return tuple(node for node in self.nodes if node.path == path and node.op != "output")

    def count(self, *changes: Change) -> int:
        """How many nodes changed in one of these ways; the output is none of them."""
        return sum(node.change in changes for node in self.nodes if node.op != "output")

    def heads(self, path: Path) -> str:
        """The heads of a branch: ``head 0``, or ``heads 0 to 1``."""
        heads = self.tree.heads_of(path)
        return f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]} to {heads[-1]}"


def short(number: float) -> str:
    """``25.6M``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
