"""Which rank has which heads, and which ranks share a branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fxcollab.errors import PatternError
from fxcollab.tree import HeadTree, Path

HEADS = "heads"
"""The dimension of a mesh along which heads are spread."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The place of this rank.

    Attributes:
        tree: the head tree.
        row: the ranks that share this one's batch, in the order of their heads.
        group: their process group.
        data: the group of the ranks that have the same heads on other batches; None where there are none.
        branches: for each branch of this rank, the trunk among them, the group of those of the row that have it, too;
            None where this rank is the only one.
        rank: this one.
    """

    tree: HeadTree
    row: tuple[int, ...]
    group: dist.ProcessGroup
    data: dist.ProcessGroup | None
    branches: Mapping[Path, dist.ProcessGroup | None]
    rank: int

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        """Itself: copies of a part, as averages of weights make them, are on the same ranks."""
        return self

    @property
    def heads(self) -> range:
        """The heads of this rank."""
        return heads_of(self.tree, len(self.row), self.row.index(self.rank))

    def owner(self, path: Path) -> int:
        """The first rank of the row that has a branch."""
        return next(_having(self.tree, self.row, path))


def heads_of(tree: HeadTree, places: int, place: int) -> range:
    """The heads of one of several places: even shares, neighbours together."""
    each = tree.heads // places
    return range(place * each, (place + 1) * each)


def place_ranks(tree: HeadTree, mesh: DeviceMesh) -> Ranks:
    """Spread the heads of ``tree`` along one dimension of a mesh; every rank of the mesh must call it.

    Raises:
        PatternError: the mesh has no dimension for heads, or they can't be shared evenly.
    """
    rows = _rows(mesh)
    count = rows.shape[1]
    if count == 1 or tree.heads % count:
        raise PatternError(
            f"{tree.heads} heads can't be spread over {count} ranks, an even share on each.",
            hint=f"use a mesh with {_divisors(tree.heads)} ranks for heads, or another number of heads",
        )
    mine = dist.get_rank()
    found: dict[Path, dist.ProcessGroup | None] = {}
    row: tuple[int, ...] = ()
    for ranks in rows.tolist():
        for path in _branches(tree):
            members = list(_having(tree, tuple(ranks), path))
            group = _group(members) if len(members) > 1 else None
            if mine in members:
                found[path], row = group, tuple(ranks)
    columns = {tuple(column): _group(column) for column in rows.t().tolist()} if len(rows) > 1 else {}
    data = next((group for column, group in columns.items() if mine in column), None)
    group = found[()]
    assert group is not None  # there are at least two in a row
    return Ranks(tree, row, group, data, found, mine)


def _rows(mesh: DeviceMesh) -> torch.Tensor:
    """Ranks by batch and by place among the heads."""
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1:
        return mesh.mesh.reshape(1, -1)
    if HEADS not in names or mesh.ndim != 2:
        raise PatternError(
            f"A mesh of dimensions {names or mesh.ndim} doesn't say where heads go.",
            hint='give init_device_mesh(device, (data, heads), mesh_dim_names=("data", "heads"))',
        )
    return mesh.mesh if names.index(HEADS) == 1 else mesh.mesh.t()


def _group(members: list[int]) -> dist.ProcessGroup:
    """Every rank makes every group, its own or not."""
    group: Any = dist.new_group(members)
    made: dist.ProcessGroup = group
    return made


def _branches(tree: HeadTree) -> Iterator[Path]:
    return (path for level in range(tree.depth + 1) for path in tree.paths(level))


def _having(tree: HeadTree, row: tuple[int, ...], path: Path) -> Iterator[int]:
    """The ranks of a row with a head behind a branch."""
    for place, rank in enumerate(row):
        if any(tree.head_path(head)[: len(path)] == path for head in heads_of(tree, len(row), place)):
            yield rank


def _divisors(count: int) -> str:
    return ", ".join(str(number) for number in range(2, count + 1) if count % number == 0)
