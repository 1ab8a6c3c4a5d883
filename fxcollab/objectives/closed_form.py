"""The collaborative loss of classes with its gradient in closed form, head by head.

The consensus is a constant, so head h's loss depends on its own logits z alone (equations 2 and 3), and its gradient
is

    beta * (softmax(z) - y) + (1 - beta) * T * (softmax(z / T) - q)

over the number of samples. Both are found in the forward pass, a few samples at a time while they lie in the cache.
What is kept for the backward pass is one tensor a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxcollab._torch import computes_forward_derivatives, is_traced, is_transformed
from fxcollab.objectives.consensus import sums_of_others
from fxcollab.objectives.tasks import IGNORED

IN_CACHE = 1 << 17
"""Values of one head that are worked on at a time on a CPU; an accelerator takes all of them."""

Loss: TypeAlias = Callable[[list[Tensor], Tensor], Tensor]


def may_be_used(heads: list[Tensor], target: Tensor) -> bool:
    """Whether this is a plain training step: what is compiled, traced or transformed takes operators instead."""
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (target, *heads))
    learnt = torch.is_grad_enabled() and any(z.requires_grad for z in heads)
    if not plain or not learnt or target.requires_grad or not heads[0].numel() or heads[0].is_meta:
        return False
    return not (torch.compiler.is_compiling() or is_traced() or is_transformed() or computes_forward_derivatives())


def loss(
    heads: list[Tensor], target: Tensor, beta: float, temperature: float, mean: bool, by_operators: Loss
) -> Tensor:
    """The sum over heads of L_h (equations 3 and 4), the consensus being a constant.

    Args:
        heads: logits (N, C) or (N, C, d1, ...), at least two.
        target: class indices (N, d1, ...), or soft labels like the logits.
        beta: weight of the labels.
        temperature: T.
        mean: over positions; else their sum.
        by_operators: the same for what differentiates twice.
    """
    total: Tensor = _ClosedForm.apply(beta, temperature, mean, by_operators, target, *heads)
    return total


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, beta: float, temperature: float, mean: bool, by_operators: Loss, target: Tensor, *heads: Tensor
    ) -> Tensor:
        weights = _weights(beta, temperature, mean, target, heads[0])
        ctx.save_for_backward(target, *heads)
        ctx.by_operators, ctx.gradients = by_operators, [torch.empty_like(z) for z in heads]
        total = heads[0].new_zeros(())
        for rows in _rows(heads[0]):
            total += _of_rows([z[rows] for z in heads], target[rows], weights, [g[rows] for g in ctx.gradients])
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
            found = [gradient.mul_(scale) for gradient in gradients]  # in place: it is nobody else's
        return None, None, None, None, None, *found


@dataclass(frozen=True)
class _Weights:
    """What each term is multiplied with: beta and 1 - beta, over the positions that count in it."""

    hard: Tensor | float
    soft: float
    temperature: float


def _weights(beta: float, temperature: float, mean: bool, target: Tensor, z: Tensor) -> _Weights:
    if not mean:
        return _Weights(beta, 1 - beta, temperature)
    positions = z.numel() // z.shape[1]
    labelled = positions if target.is_floating_point() else (target != IGNORED).sum().to(z.dtype)
    return _Weights(beta / labelled, (1 - beta) / positions, temperature)


def _rows(z: Tensor) -> Iterator[slice]:
    """Samples in parts."""
    count = len(z)
    step = max(1, IN_CACHE * count // z.numel()) if z.device.type == "cpu" else count
    return (slice(start, start + step) for start in range(0, count, step))


def _of_rows(parts: list[Tensor], target: Tensor, weights: _Weights, gradients: list[Tensor]) -> Tensor:
    """The loss of some samples; its gradients are written into ``gradients``."""
    share = 1 / ((len(parts) - 1) * weights.temperature)
    total = parts[0].new_zeros(())
    for z, others, gradient in zip(parts, sums_of_others(parts), gradients, strict=True):
        total += _of_head(z, torch.softmax(others * share, 1), target, weights, gradient)
    return total


def _of_head(z: Tensor, q: Tensor, target: Tensor, weights: _Weights, gradient: Tensor) -> Tensor:
    """One head's loss on some samples."""
    temperature, pull = weights.temperature, weights.soft * weights.temperature
    low = z - z.amax(1, keepdim=True)
    warm = (low * (1 / temperature)).exp_()
    cold = _cooled(warm, low, temperature)
    warm_sum, cold_sum = warm.sum(1, keepdim=True), cold.sum(1, keepdim=True)
    soft = torch.dot(q.flatten(), low.flatten()) - temperature * warm_sum.log().sum()
    if target.is_floating_point():
        scale = weights.hard * target.sum(1, keepdim=True)
        hard = weights.hard * torch.dot(target.flatten(), low.flatten()) - (scale * cold_sum.log()).sum()
        torch.mul(cold, scale / cold_sum, out=gradient).sub_(target * weights.hard)
    else:
        counts = (target != IGNORED).unsqueeze(1)
        label, scale = torch.where(counts, target.unsqueeze(1), 0), weights.hard * counts.to(z.dtype)
        hard = (scale * (low.gather(1, label) - cold_sum.log())).sum()
        torch.mul(cold, scale / cold_sum, out=gradient).scatter_add_(1, label, -scale)
    gradient.addcmul_(warm, pull / warm_sum).sub_(q, alpha=pull)
    return -hard - pull * soft


def _cooled(warm: Tensor, low: Tensor, temperature: float) -> Tensor:
    """``exp(low)``, of ``exp(low / T)``: by squaring where T is 1, 2 or 4, which is much cheaper."""
    if temperature == 1:
        return warm
    if temperature == 2:
        return warm.square()
    return warm.square().square_() if temperature == 4 else low.exp()
