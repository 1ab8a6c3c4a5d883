"""Where each node of a training graph comes from; prune, verify and the diff read nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from fxcollab.errors import StateError
from fxcollab.tree import Path

META_KEY = "fxcollab"

Kind = Literal["shared", "clone", "rescale", "copy", "state", "output"]
"""``shared``: of the trunk. ``clone``: one instance of a node behind a split, head 0's own included.
``rescale``, ``copy`` (guards a crossing value against in-place writes) and ``state`` (a shallower parameter
handed to a module) are inserted. ``output``: the tuple over the heads."""

INSERTED: frozenset[Kind] = frozenset({"rescale", "copy", "state"})


@dataclass(frozen=True)
class Provenance:
    """The origin of one node.

    Attributes:
        kind: what the rewrite did.
        origin: the name of the node of the captured graph it stems from.
        branch: the path of the branch it belongs to; empty for the trunk.
        target: the target of the origin, before peers took its place.
        fed: whether the rewrite put shallower parameters before the arguments of a module's call.
    """

    kind: Kind
    origin: str
    branch: Path
    target: Any = None
    fed: bool = False

    @property
    def inserted(self) -> bool:
        """Whether the node has no counterpart in the captured graph."""
        return self.kind in INSERTED


def provenance(node: fx.Node) -> Provenance:
    """The provenance of a training graph's node.

    Raises:
        StateError: the node has none: it was added after the rewrite.
    """
    found = node.meta.get(META_KEY)
    if not isinstance(found, Provenance):
        raise StateError(
            f"Node {node.name!r} was not made by fxcollab.",
            where=f"{node.op} {node.target}",
            why="it carries no provenance, so it belongs to no head",
            hint="run other passes after pruning, or let them copy node.meta['fxcollab'] from the node they replace",
        )
    return found
