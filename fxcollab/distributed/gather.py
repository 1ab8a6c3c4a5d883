"""The outputs of all heads on every rank, and the gradients of what ranks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxcollab._torch import at_end_of_backward, backward_id, pytree
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.distributed.ranks import Ranks, heads_of
from fxcollab.errors import StateError
from fxcollab.rewriting.eval_output import mean_of_heads
from fxcollab.rewriting.outputs import EvalOutput
from fxcollab.tree import Path


class Gather:
    """A forward hook: a rank's outputs become those of all heads, and gradients are summed over ranks after backward.

    Every rank of a row computes the same loss of the same outputs, so the gradient of a head's output is complete on
    the head's rank, and isn't communicated. Gradients of parameters that several ranks have are summed at the end of
    the backward, without those of earlier backwards, so that gradients can be accumulated. ``parameters`` are those
    of each branch of this rank, and ``eval_output`` is what eval mode returns.
    """

    def __init__(
        self, ranks: Ranks, parameters: Mapping[Path, Sequence[nn.Parameter]], eval_output: EvalOutput
    ) -> None:
        self._ranks, self._parameters, self._eval_output = ranks, parameters, eval_output
        self._same_batch = False
        self._task: int | None = None
        self._before: list[tuple[nn.Parameter, Tensor | None]] = []

    def __call__(self, module: CollabGraphModule, args: Any, kwargs: Any, outputs: tuple[Any, ...]) -> Any:
        """The outputs of all heads, for the ``outputs`` of this rank's; in eval mode what that returns."""
        gathered = self._gathered(args, kwargs, outputs)
        if module.training or module.returns_all or self._eval_output == "all":
            return gathered
        return gathered[0] if self._eval_output == "head" else mean_of_heads(gathered)

    def _gathered(self, args: Any, kwargs: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._same_batch:
            self._check_batch((args, kwargs))
        flat, specs = zip(*map(pytree.tree_flatten, outputs), strict=True)
        own = [leaf for leaves in flat for leaf in leaves if isinstance(leaf, Tensor)]
        always = torch.zeros((), requires_grad=torch.is_grad_enabled())  # also where this rank's heads are frozen
        gathered = iter(_Gathered.apply(self, len(flat), always, *own))
        heads = [
            [next(gathered) if isinstance(leaf, Tensor) else leaf for leaf in flat[0]]
            for _ in range(self._ranks.tree.heads)
        ]
        return tuple(pytree.tree_unflatten(leaves, specs[0]) for leaves in heads)

    def gather(self, own: Sequence[Tensor], heads: int) -> list[Tensor]:
        """The tensors of all heads, head by head, for those of this rank, which has ``heads`` heads."""
        each, places = len(own) // heads, len(self._ranks.row)
        counts = [len(heads_of(self._ranks.tree, places, place)) for place in range(places)]
        columns = []
        for leaf in range(each):
            # Collectives take equal shapes: ranks with fewer heads give one of theirs again.
            stacked = torch.stack([own[min(head, heads - 1) * each + leaf] for head in range(max(counts))])
            parts = [torch.empty_like(stacked) for _ in counts]
            dist.all_gather(parts, stacked, group=self._ranks.group)
            columns.append([value for part, count in zip(parts, counts, strict=True) for value in part[:count]])
        return [column[head] for head in range(self._ranks.tree.heads) for column in columns]

    def begin_backward(self) -> None:
        """Once per backward: set aside accumulated gradients, and have this backward's summed at its end."""
        task = backward_id()
        if task == self._task:
            return
        self._task = task
        self._before = [(p, p.grad) for parameters in self._parameters.values() for p in parameters]
        for parameter, _ in self._before:
            parameter.grad = None
        at_end_of_backward(self._end_backward)

    def _end_backward(self) -> None:
        for path, parameters in self._parameters.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:
                continue
            data = self._ranks.data
            for group in (self._ranks.branches[path], data):
                if group is not None:
                    _sum(gradients, group)
            if data is not None:
                for gradient in gradients:
                    gradient.div_(dist.get_world_size(data))
        for parameter, before in self._before:
            if before is not None:
                parameter.grad = before if parameter.grad is None else before + parameter.grad
        self._before = []

    def _check_batch(self, inputs: object) -> None:
        """Raise a `StateError` unless all ranks of the row have the same batch; checked once, by checksums."""
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        mine = torch.stack([_sums(tensor) for tensor in tensors])
        found = [torch.empty_like(mine) for _ in self._ranks.row]
        dist.all_gather(found, mine, group=self._ranks.group)
        if not all(torch.equal(other, found[0]) for other in found):
            raise StateError(
                "Ranks that share the heads of one model got different batches.",
                where=f"ranks {', '.join(map(str, self._ranks.row))}",
                why="heads learn from one another on the same samples",
                hint="draw batches by the rank in the mesh's 'data' dimension, not by the global rank",
            )
        self._same_batch = True


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gather: Gather, heads: int, always: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.gather, ctx.count, ctx.first = gather, len(own), gather._ranks.heads.start * (len(own) // heads)
        return tuple(gather.gather(own, heads))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.gather.begin_backward()
        return None, None, None, *gradients[ctx.first : ctx.first + ctx.count]


def _sums(values: Tensor) -> Tensor:
    """Checksums of a batch that depend on the order of samples, too."""
    plain = values.abs() if values.is_complex() else values
    flat = plain.detach().flatten().double().nan_to_num(0.5, 1e6, -1e6)
    return torch.stack((flat.sum(), flat.cumsum(0).sum()))


def _sum(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum over a group, in place; tensors of one type are communicated as one."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        whole = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(whole, group=group)
        totals = torch.split(whole, [tensor.numel() for tensor in alike])
        for tensor, total in zip(alike, totals, strict=True):
            tensor.copy_(total.view(tensor.shape))
