"""The collaborative loss of classes with its gradient in closed form, head by head.

The consensus is a constant, so head h's loss depends on its own logits z alone (equations 2 and 3), and its gradient
is

    beta * (softmax(z) - y) + (1 - beta) * T * (softmax(z / T) - q)

over the number of samples. The forward pass computes both in float32 or wider, a few samples at a time: on a CPU as
many as lie in the cache. One tensor per head is kept for the backward pass, in the type of the logits; in float32 for
float16, whose small gradients would be 0 before a gradient scaler scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fxcollab._torch import computes_forward_derivatives, is_traced, is_transformed
from fxcollab.objectives.consensus import sums_of_others
from fxcollab.objectives.hard_loss import IGNORED

IN_CACHE = 1 << 17
"""Values of one head that are computed at a time on a CPU."""
ON_ACCELERATOR = 1 << 24
"""On other devices: many enough to keep them busy, 64 MiB."""

Loss: TypeAlias = Callable[[list[Tensor], Tensor], Tensor]


def may_be_used(heads: list[Tensor], target: Tensor) -> bool:
    """Whether this is a plain training step: what is compiled, traced or transformed needs operators instead."""
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (target, *heads))
    training = torch.is_grad_enabled() and any(z.requires_grad for z in heads)
    if not plain or not training or target.requires_grad or not heads[0].numel() or heads[0].is_meta:
        return False
    if any(z.dtype != heads[0].dtype for z in heads):
        return False
    return not (torch.compiler.is_compiling() or is_traced() or is_transformed() or computes_forward_derivatives())


class Weights(NamedTuple):
    """The weights of the hard and of the soft term, the temperature, and whether both are means over positions."""

    hard: float
    soft: float
    temperature: float
    mean: bool


def loss(heads: list[Tensor], target: Tensor, counted: Tensor | None, weights: Weights, by_operators: Loss) -> Tensor:
    """The sum over heads of L_h (equations 3 and 4), the consensus being a constant.

    Heads are (N, C) or (N, C, d1, ...), targets class indices (N, d1, ...) or soft labels shaped like the logits.
    The soft term counts where the mask ``counted`` (N, d1, ...) is true, everywhere without one. ``by_operators``
    computes the same for second derivatives.
    """
    z, labelled = heads[0], None if target.is_floating_point() else target != IGNORED
    hard = weights.hard / (count_of(labelled, z) if weights.mean else 1)
    if counted is not None and counted.device.type == "cpu" and counted.all():  # an accelerator would wait
        counted = None
    soft: Tensor | float = weights.soft / (count_of(counted, z) if weights.mean else 1)
    if counted is not None:
        soft = (soft * counted.to(wide(z))).unsqueeze(1)
    total: Tensor = _ClosedForm.apply(hard, soft, weights.temperature, by_operators, target, *heads)
    return total


def count_of(mask: Tensor | None, z: Tensor) -> Tensor | int:
    """How many positions a mask has, at least 1; of none, all positions of logits."""
    return z.numel() // z.shape[1] if mask is None else mask.sum().clamp(min=1).to(wide(z))


def wide(z: Tensor) -> torch.dtype:
    """The type in which logits are computed with."""
    return torch.promote_types(z.dtype, torch.float32)


def _kept(z: Tensor) -> torch.dtype:
    """The type of the gradients that are kept: the logits' own, if it has numbers as small as float32."""
    return z.dtype if torch.finfo(z.dtype).tiny <= torch.finfo(torch.float32).tiny else torch.float32


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hard: Tensor | float,
        soft: Tensor | float,
        temperature: float,
        by_operators: Loss,
        target: Tensor,
        *heads: Tensor,
    ) -> Tensor:
        """The loss with the weights ``hard`` and ``soft`` of the two terms at one position; of soft (N, 1, ...)."""
        ctx.save_for_backward(target, *heads)
        ctx.by_operators, ctx.gradients = by_operators, [torch.empty_like(z, dtype=_kept(z)) for z in heads]
        z, count = heads[0], len(heads[0])
        step = max(1, (IN_CACHE if z.device.type == "cpu" else ON_ACCELERATOR) * count // z.numel())
        total, share = z.new_zeros((), dtype=wide(z)), 1 / ((len(heads) - 1) * temperature)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            parts, gradients = [z[rows].to(wide(z)) for z in heads], [kept[rows] for kept in ctx.gradients]
            consensus = [torch.softmax(others * share, 1) for others in sums_of_others(parts)]
            of_rows = temperature * (soft[rows] if isinstance(soft, Tensor) else soft)
            losses = [
                of_head(z, q, target[rows], hard, of_rows, temperature, gradient)
                for z, q, gradient in zip(parts, consensus, gradients, strict=True)
            ]
            total += sum(losses)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        target, *heads = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():  # a second time, or to be differentiated again
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                found = torch.autograd.grad(ctx.by_operators(heads, target), heads, scale, create_graph=again)
        elif scale.device.type == "cpu" and scale.item() == 1:
            found = gradients
        else:
            found = [gradient.mul_(scale) for gradient in gradients]  # in place: nothing else refers to it
        return None, None, None, None, None, *found


def of_head(
    z: Tensor,
    q: Tensor,
    target: Tensor,
    hard: Tensor | float,
    soft: Tensor | float,
    temperature: float,
    gradient: Tensor,
) -> Tensor:
    """One head's loss on some samples; its gradient is written into ``gradient``. ``soft`` includes a factor T."""
    kept, gradient = gradient, gradient if gradient.dtype == z.dtype else torch.empty_like(z)
    low = z - z.amax(1, keepdim=True)
    warm = (low * (1 / temperature)).exp_()
    cold = _cooled(warm, low, temperature)
    warm_sum, cold_sum = warm.sum(1, keepdim=True), cold.sum(1, keepdim=True)
    q.mul_(soft)
    soft_term = torch.dot(q.flatten(), low.flatten()) - temperature * (soft * warm_sum.log()).sum()
    if target.is_floating_point():
        scale = hard * target.sum(1, keepdim=True)
        hard_term = hard * torch.dot(target.flatten(), low.flatten()) - (scale * cold_sum.log()).sum()
        torch.mul(cold, scale / cold_sum, out=gradient).sub_(target * hard)
    else:
        counts = (target != IGNORED).unsqueeze(1)
        label, scale = torch.where(counts, target.unsqueeze(1), 0), hard * counts.to(z.dtype)
        hard_term = (scale * (low.gather(1, label) - cold_sum.log())).sum()
        torch.mul(cold, scale / cold_sum, out=gradient).scatter_add_(1, label, -scale)
    gradient.addcmul_(warm, soft / warm_sum).sub_(q)
    if kept is not gradient:
        kept.copy_(gradient)
    return -hard_term - soft_term


def _cooled(warm: Tensor, low: Tensor, temperature: float) -> Tensor:
    """``exp(low)``, from ``exp(low / T)``: by squaring where T is 1, 2 or 4, which is much cheaper."""
    if temperature == 1:
        return warm
    if temperature == 2:
        return warm.square()
    return warm.square().square_() if temperature == 4 else low.exp()
