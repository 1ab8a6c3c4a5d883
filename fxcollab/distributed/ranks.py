"""Which rank has which heads, and which ranks share a branch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fxcollab.errors import PatternError
from fxcollab.tree import HeadTree, Path

HEADS = "heads"
"""The dimension of a mesh along which heads are distributed."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The place of this rank in its row: the ranks that train the heads of one model on one batch.

    Attributes:
        tree: the head tree.
        row: the ranks of the row, in the order of their heads.
        place: that of this rank in the row.
        group: the row's process group.
        groups: for each branch of this rank, trunk included, the group of the ranks that have it; None where this
            rank is the only one.
        others: the groups of the mesh's other dimensions, whose ranks have the same heads.
    """

    tree: HeadTree
    row: tuple[int, ...]
    place: int
    group: dist.ProcessGroup
    groups: Mapping[Path, dist.ProcessGroup | None]
    others: tuple[dist.ProcessGroup, ...]

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        """Itself: copies of a part, such as averaged weights, are on the same ranks."""
        return self

    @property
    def heads(self) -> range:
        """The heads of this rank."""
        return heads_of(self.tree, len(self.row), self.place)

    def holders(self, path: Path) -> list[int]:
        """The places in the row of the ranks that have a branch."""
        return holders(self.tree, len(self.row), path)


def heads_of(tree: HeadTree, places: int, place: int) -> range:
    """The heads at one of several places along a row: consecutive ones, in shares that differ by one at most."""
    return range(place * tree.heads // places, (place + 1) * tree.heads // places)


def holders(tree: HeadTree, places: int, path: Path) -> list[int]:
    """The places of a row that have a head behind a branch."""
    behind = set(tree.heads_of(path))
    return [place for place in range(places) if behind.intersection(heads_of(tree, places, place))]


def place_ranks(tree: HeadTree, mesh: DeviceMesh) -> Ranks:
    """Distribute the heads of ``tree`` along a mesh's dimension ``heads``, or along its only one.

    All ranks of the row must call it; ranks of other rows need not.

    Raises:
        PatternError: the mesh has no dimension for heads, or more ranks than heads, or only one.
    """
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and HEADS not in names:
        raise PatternError(
            f"A mesh of dimensions {names or mesh.ndim} has no dimension {HEADS!r}.",
            hint='give init_device_mesh(device, (heads, data), mesh_dim_names=("heads", "data")), or a slice of it',
        )
    own = mesh if mesh.ndim == 1 else mesh[HEADS]
    row = tuple(own.mesh.tolist())
    if not 2 <= len(row) <= tree.heads:
        raise PatternError(
            f"{tree.heads} heads can't be distributed over {len(row)} rank{'s' * (len(row) > 1)}.",
            why="every rank has a head" if len(row) > 1 else "there is nothing to distribute",
            hint=f"use a mesh with {'2' if tree.heads == 2 else f'2 to {tree.heads}'} ranks for heads",
        )
    place, group = own.get_local_rank(), own.get_group()
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(len(row))): group}
    groups: dict[Path, dist.ProcessGroup | None] = {}
    for path in chain.from_iterable(map(tree.paths, range(tree.depth + 1))):
        having = tuple(holders(tree, len(row), path))
        if len(having) > 1 and having not in made:
            # Rows need not know of each other, but names of groups count them: a rank that isn't in it makes another.
            ranks = [row[other] for other in (having if place in having else (place,))]
            new: Any = dist.new_group(ranks, use_local_synchronization=True)
            made[having] = new
        if place in having:
            groups[path] = made.get(having)
    others = tuple(mesh.get_group(name) for name in names if name != HEADS) if mesh.ndim > 1 else ()
    return Ranks(tree, row, place, group, groups, others)
