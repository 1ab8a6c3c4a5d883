"""The origin of each node of a training graph, on which prune, verify and the diff rely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from fxcollab.errors import StateError
from fxcollab.fx_utils import place
from fxcollab.runtime.operators import ReadsOnly
from fxcollab.tree import Path, branch_and_name, branch_name

META_KEY = "fxcollab"

Kind = Literal["shared", "clone", "rescale", "copy", "state", "output"]
"""``shared``: of the trunk. ``clone``: one instance of a node behind a split, head 0's own included.
``rescale``, ``copy`` (a private copy of a crossing value) and ``state`` (a shallower parameter, as an argument of a
module's call) are inserted. ``output``: the tuple over the heads."""

INSERTED: frozenset[Kind] = frozenset({"rescale", "copy", "state"})


@dataclass(frozen=True)
class Provenance:
    """The origin of one node.

    Attributes:
        kind: what the rewrite did.
        origin: the name of the node of the captured graph it stems from.
        branch: the path of the branch it belongs to; empty for the trunk.
        target: the target of the origin, before the peers' took its place.
        position: the position of the origin in the captured graph; of an inserted node that of its first reader.
        functional: whether shallower parameters are the first argument of a module's call.
    """

    kind: Kind
    origin: str
    branch: Path
    target: Any = None
    position: int = 0
    functional: bool = False

    @property
    def inserted(self) -> bool:
        """Whether the node has no counterpart in the captured graph."""
        return self.kind in INSERTED


def provenance_of(graph: fx.Graph, peers: str) -> Mapping[fx.Node, Provenance]:
    """The provenance of every node of a training graph, whose other branches' state lives under ``peers``.

    Other passes may have edited the graph. A node's target is what it calls now. A node that was added belongs to the
    branch of what it reads, or, where all that read it lie in one deeper branch, to that one. In the captured order
    it follows what it reads, and what its branch computes before it.

    Raises:
        StateError: an added node reads values of several heads.
    """
    found: dict[fx.Node, Provenance] = {}
    for node in graph.nodes:
        own = node.meta.get(META_KEY)
        found[node] = _current(node, own, peers) if isinstance(own, Provenance) else _derived(node, found, peers)
    for node in reversed(graph.nodes):
        if META_KEY not in node.meta and node.users:
            readers = _common_branch([found[user].branch for user in node.users])
            if readers[: len(found[node].branch)] == found[node].branch:
                found[node] = replace(found[node], kind="clone" if readers else "shared", branch=readers)
    latest: dict[Path, int] = {}
    for node, origin in found.items():
        places = [origin.position, *(found[source].position for source in node.all_input_nodes)]
        if META_KEY not in node.meta:
            places.append(latest.get(origin.branch, 0))
        found[node] = replace(origin, position=max(places))
        if not origin.inserted:
            latest[origin.branch] = max(places)
    return found


def _current(node: fx.Node, own: Provenance, peers: str) -> Provenance:
    """The provenance from the rewrite, with the target that the node has now."""
    if own.inserted or own.functional or own.kind == "output":
        return own
    return replace(own, target=_own_branch(node, peers)[1])


def _derived(node: fx.Node, known: Mapping[fx.Node, Provenance], peers: str) -> Provenance:
    """The provenance of an added node, by what it reads."""
    if node.op == "output":
        return Provenance("output", node.name, ())
    own, target = _own_branch(node, peers)
    paths = [own, *(known[source].branch for source in node.all_input_nodes)]
    branch = max(paths, key=len)
    other = next((path for path in paths if path != branch[: len(path)]), None)
    if other is not None:
        raise StateError(
            f"Node {node.name!r} belongs to no head.",
            where=place(node),
            why="it was added after the rewrite and reads values of several heads: of branches "
            + " and ".join(sorted((branch_name(other), branch_name(branch)))),
            hint="give every head a node of its own, or combine the heads' outputs outside of the graph",
        )
    return Provenance("clone" if branch else "shared", node.name, branch, target)


def _own_branch(node: fx.Node, peers: str) -> tuple[Path, Any]:
    """The branch whose state a node names, and its target in the original."""
    if node.op not in ("call_module", "get_attr"):
        return (), node.target.function if isinstance(node.target, ReadsOnly) else node.target
    return branch_and_name(str(node.target), peers)


def _common_branch(paths: Sequence[Path]) -> Path:
    """The innermost branch around all of these."""
    common: Path = ()
    for choices in zip(*paths, strict=False):
        if len(set(choices)) > 1:
            break
        common = (*common, choices[0])
    return common
