"""What ranks that train one model's heads exchange: outputs, gradients of shared values, and whether they agree.

All of it happens at values of the graph, so that nothing depends on how parameters are kept, and each is an operator
of its own for ``torch.compile``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import has_side_effect

from fxcollab.errors import StateError, warn_caller
from fxcollab.runtime.tensors import map_tensors

_GROUPS: dict[str, dist.ProcessGroup] = {}
_CALLS: Counter[tuple[str, str]] = Counter()


def register(group: dist.ProcessGroup) -> str:
    """The name by which the operators of one part find a process group."""
    name = f"{group.group_name}.{len(_GROUPS)}"
    _GROUPS[name] = group
    return name


# ------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op(
    "fxcollab::sum_over_ranks", mutates_args=(), schema="(Tensor[] values, str group) -> Tensor[]"
)
def _sum_over_ranks(values: Sequence[Tensor], group: str) -> list[Tensor]:
    sums = [value.clone(memory_format=torch.contiguous_format) for value in values]
    with _answered(group) as ranks:
        for work in [dist.all_reduce(value, group=ranks, async_op=True) for value in sums]:
            work.wait()
    return sums


@_sum_over_ranks.register_fake
def _(values: Sequence[Tensor], group: str) -> list[Tensor]:
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]


@torch.library.custom_op(
    "fxcollab::gather_heads", mutates_args=(), schema="(Tensor[] own, int[] counts, int place, str group) -> Tensor[]"
)
def _gather_heads(own: Sequence[Tensor], counts: Sequence[int], place: int, group: str) -> list[Tensor]:
    """The tensors of all heads, head by head, for those of this rank, which has ``counts[place]`` heads."""
    heads, each = counts[place], len(own) // counts[place]
    found: dict[tuple[int, int, int], Tensor] = {}
    with _answered(group) as ranks:
        for turn in range(max(counts)):  # collectives take equal shapes: ranks with fewer heads give their last again
            for leaf in range(each):
                value = own[min(turn, heads - 1) * each + leaf].contiguous()
                parts = [torch.empty_like(value) for _ in counts]
                dist.all_gather(parts, value, group=ranks)
                found.update({(rank, turn, leaf): part for rank, part in enumerate(parts)})
    return [
        found[rank, head, leaf] for rank, count in enumerate(counts) for head in range(count) for leaf in range(each)
    ]


@_gather_heads.register_fake
def _(own: Sequence[Tensor], counts: Sequence[int], place: int, group: str) -> list[Tensor]:
    leaves = own[: len(own) // counts[place]]
    return [
        torch.empty_like(leaf, memory_format=torch.contiguous_format) for _ in range(sum(counts)) for leaf in leaves
    ]


@torch.library.custom_op(
    "fxcollab::agree",
    mutates_args=(),
    schema="(Tensor[] values, str what, float tolerance, int every, str group) -> ()",
)
def _agree(values: Sequence[Tensor], what: str, tolerance: float, every: int, group: str) -> None:
    """Raise a `StateError` unless all ranks of a group have the same values, to a tolerance; every so many calls.

    Of ``heads`` it is told where they are the same: DDP and FSDP2 over other heads' ranks give all one's weights.
    """
    _CALLS[what, group] += 1
    if not values or not every or (_CALLS[what, group] - 1) % every:
        return
    mine = torch.stack([_fingerprint(value) for value in values])
    with _answered(group) as ranks:
        found = [torch.empty_like(mine) for _ in range(ranks.size())]
        dist.all_gather(found, mine, group=ranks)
    table = torch.stack(found).cpu()  # ranks, values, (projection, size)
    rounding = [4 * torch.finfo(v.dtype).eps if v.is_floating_point() else 0.0 for v in values]
    tolerances = torch.tensor(rounding, dtype=table.dtype).clamp(min=tolerance)[:, None]
    if what == "heads":
        if bool((table == table[0]).all()):
            warn_caller("heads on different ranks give the same outputs: is DDP or FSDP2 over the dimension 'heads'?")
        return
    apart = (table - table[0]).abs() > tolerances * table[..., 1:].amax(0)
    if apart.any():
        members = dist.get_process_group_ranks(_GROUPS[group])
        other = members[int(apart.flatten(1).any(1).nonzero()[0])]
        summary, why, hint = _DIFFERENCES[what]
        raise StateError(
            f"Ranks that share the heads of one model got {summary}.",
            where=f"ranks {members[0]} and {other}",
            why=why,
            hint=hint,
        )


@_agree.register_fake
def _(values: Sequence[Tensor], what: str, tolerance: float, every: int, group: str) -> None:
    return None


has_side_effect(torch.ops.fxcollab.agree.default)

_DIFFERENCES = {
    "batch": (
        "different batches",
        "heads learn from one another on the same samples",
        "draw batches by the rank in the mesh's dimension 'data', not by the global rank",
    ),
    "loss": (
        "different gradients of the loss",
        "each computes the loss of all heads, so labels, options of the loss and its scale are the same on all",
        "draw labels with their batches, by the rank in the mesh's dimension 'data'",
    ),
    "shared": (
        "different values of the layers that they share",
        "their weights or buffers differ, or random numbers do",
        "load the same weights on all ranks, call fxcollab.align(part), and seed ranks of a row alike",
    ),
}


@contextmanager
def _answered(group: str) -> Iterator[dist.ProcessGroup]:
    """The group of a name; what a collective raises where a rank doesn't answer says so."""
    ranks = _GROUPS[group]
    try:
        yield ranks
    except RuntimeError as error:
        members = dist.get_process_group_ranks(ranks)
        raise StateError(
            f"Of the ranks {', '.join(map(str, members))}, which train the heads of one model, one doesn't answer.",
            where=f"rank {dist.get_rank()}",
            why=f"it has ended, or computes something else: {str(error).splitlines()[0]}",
            hint="look for the first error in the other ranks' output; the time-out is that of init_process_group",
        ) from error


@lru_cache(maxsize=64)
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device, dtype=torch.float64).sin_().to(dtype)


def _fingerprint(value: Tensor) -> Tensor:
    """A projection of a tensor's values, in which each position counts differently, and their size."""
    value = local(value)
    value = torch.view_as_real(value) if value.is_complex() else value
    if not value.numel():
        return torch.zeros(2, dtype=torch.float64, device=value.device)
    rows = value.detach().reshape(-1, value.shape[-1] if value.dim() else 1)
    rows = rows if rows.is_floating_point() else rows.float()
    each = (rows @ _weights(rows.shape[1], rows.dtype, rows.device)).double().nan_to_num(0.5, 1e6, -1e6)
    return torch.stack((each @ _weights(len(each), each.dtype, each.device), torch.linalg.vector_norm(each)))


# ------------------------------------------------------------------------------------------------ in the graph


class Gathered(torch.autograd.Function):
    """The outputs of all heads for this rank's: every rank computes the same loss of them.

    So the gradient of a head's output is complete on the head's rank, also through the other heads' consensus.
    """

    @staticmethod
    def forward(
        ctx: Any, counts: list[int], place: int, group: str, every: int, always: Tensor, *own: Tensor
    ) -> tuple[Tensor, ...]:
        """All heads' tensors; ``always`` requires grad where this rank's heads are frozen, too."""
        each = len(own) // counts[place]
        ctx.own = slice(sum(counts[:place]) * each, sum(counts[: place + 1]) * each)
        ctx.group, ctx.every = group, every
        found = tuple(torch.ops.fxcollab.gather_heads(list(own), counts, place, group))
        ctx.mark_non_differentiable(*(value for value in found if not _learns(value)))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The rank's share, after a look whether the others have the same."""
        real = [gradient for gradient in gradients if _learns(gradient)]
        torch.ops.fxcollab.agree(real, "loss", 1e-3, ctx.every, ctx.group)
        return None, None, None, None, None, *gradients[ctx.own]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: str, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sums = torch.ops.fxcollab.sum_over_ranks([local(gradient) for gradient in gradients], ctx.group)
        return None, *(_like(total, gradient) for total, gradient in zip(sums, gradients, strict=True))


class Exchange(nn.Module):
    """Values of a branch that several ranks have, on their way to deeper ones: their gradients are summed over ranks.

    So each of these ranks has the whole gradient of the branch, whatever synchronises parameters over other ranks.

    Args:
        group: the name of the ranks' process group.
        every: how often to look whether the ranks' values are the same.
    """

    def __init__(self, group: str, every: int) -> None:
        super().__init__()
        self.group, self.every = group, every

    def forward(self, values: Any) -> Any:
        """The values themselves."""
        own: list[Tensor] = []
        map_tensors(lambda leaf: own.append(leaf) if _learns(leaf) and leaf.requires_grad else None, values)
        if not own:
            return values
        torch.ops.fxcollab.agree([leaf.detach() for leaf in own], "shared", 1e-2, self.every, self.group)
        summed = iter(_Summed.apply(self.group, *own))
        return map_tensors(lambda leaf: next(summed) if _learns(leaf) and leaf.requires_grad else leaf, values)


def local(value: Any) -> Any:
    """The rank's share of a ``DTensor``, whose import takes seconds; anything else itself."""
    return value.to_local() if hasattr(value, "to_local") else value


def _like(value: Tensor, other: Any) -> Tensor:
    if not hasattr(other, "to_local"):
        return value
    made: Tensor = type(other).from_local(value, other.device_mesh, other.placements)
    return made


def _learns(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
