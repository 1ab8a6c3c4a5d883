"""Which rank has which heads, and which ranks share a branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fxcollab.errors import PatternError
from fxcollab.tree import HeadTree, Path

HEADS = "heads"
"""The dimension of a mesh along which heads are distributed."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The position of this rank in the mesh: rows share a batch, columns have the same heads.

    Attributes:
        tree: the head tree.
        row: the ranks of this rank's row, in the order of their heads.
        group: their process group.
        data: the process group of this rank's column; None where there is one row.
        branches: for each branch of this rank, including the trunk, the group of the row's ranks that have it;
            None where this rank is the only one.
        rank: this rank.
    """

    tree: HeadTree
    row: tuple[int, ...]
    group: dist.ProcessGroup
    data: dist.ProcessGroup | None
    branches: Mapping[Path, dist.ProcessGroup | None]
    rank: int

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        """Itself: copies of a part, such as averaged weights, are on the same ranks."""
        return self

    @property
    def heads(self) -> range:
        """The heads of this rank."""
        return heads_of(self.tree, len(self.row), self.row.index(self.rank))

    def owner(self, path: Path) -> int:
        """The first rank of the row that has a branch."""
        return next(_having(self.tree, self.row, path))


def heads_of(tree: HeadTree, places: int, place: int) -> range:
    """The heads at one of several places along a row: consecutive ones, in shares that differ by one at most."""
    return range(place * tree.heads // places, (place + 1) * tree.heads // places)


def place_ranks(tree: HeadTree, mesh: DeviceMesh) -> Ranks:
    """Distribute the heads of ``tree`` along one dimension of a mesh; every rank of the mesh must call it.

    Raises:
        PatternError: the mesh has no dimension for heads, or more ranks than heads, or only one.
    """
    rows = _rows(mesh)
    count = rows.shape[1]
    if not 2 <= count <= tree.heads:
        raise PatternError(
            f"{tree.heads} heads can't be distributed over {count} rank{'s' * (count > 1)}.",
            why="every rank has a head" if count > 1 else "there is nothing to distribute",
            hint=f"use a mesh with {'2' if tree.heads == 2 else f'2 to {tree.heads}'} ranks for heads",
        )
    mine = dist.get_rank()
    branches: dict[Path, dist.ProcessGroup | None] = {}
    # Every rank makes every group, its own or not: torch.distributed requires it.
    for row in rows.tolist():
        for path in chain.from_iterable(map(tree.paths, range(tree.depth + 1))):
            members = list(_having(tree, row, path))
            group = _group(members) if len(members) > 1 else None
            if mine in members:
                branches[path] = group
    columns = [(column, _group(column)) for column in rows.t().tolist()] if len(rows) > 1 else []
    data = next((group for column, group in columns if mine in column), None)
    own = next(tuple(row) for row in rows.tolist() if mine in row)
    group = branches[()]
    assert group is not None  # there are at least two in a row
    return Ranks(tree, own, group, data, branches, mine)


def _rows(mesh: DeviceMesh) -> torch.Tensor:
    """The ranks of a mesh, one row per batch."""
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1:
        return mesh.mesh.reshape(1, -1)
    if HEADS not in names or mesh.ndim != 2:
        raise PatternError(
            f"A mesh of dimensions {names or mesh.ndim} has no dimension {HEADS!r} beside one for data.",
            hint='give init_device_mesh(device, (data, heads), mesh_dim_names=("data", "heads"))',
        )
    return mesh.mesh if names.index(HEADS) == 1 else mesh.mesh.t()


def _group(members: list[int]) -> dist.ProcessGroup:
    group: Any = dist.new_group(members)  # a number on ranks that are not members, which don't use it
    made: dist.ProcessGroup = group
    return made


def _having(tree: HeadTree, row: Sequence[int], path: Path) -> Iterator[int]:
    """The ranks of a row with a head behind a branch."""
    for place, rank in enumerate(row):
        if any(tree.head_path(head)[: len(path)] == path for head in heads_of(tree, len(row), place)):
            yield rank
