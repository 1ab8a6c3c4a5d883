"""The collaborative loss of last hidden states and output layers: no head's logits are ever held whole.

A few rows at a time, logits are computed, their loss and gradient (see `closed_form`), and from these the gradients
of the hidden states and of the output layers, all in the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcollab.objectives.closed_form import Weights, count_of, of_head, wide
from fxcollab.objectives.consensus import sums_of_others
from fxcollab.objectives.hard_loss import IGNORED

AT_A_TIME = 1 << 24
"""Values of one head that are computed at a time: many rows, or reading the output layer would take longest."""


def loss(
    hidden: Sequence[Tensor],
    layers: Sequence[tuple[Tensor, Tensor | None]],
    target: Tensor,
    counted: Tensor | None,
    weights: Weights,
) -> Tensor:
    """The sum over heads of L_h (equations 3 and 4), the consensus being a constant.

    Args:
        hidden: (N, D) for each head.
        layers: for each head the weight (C, D) and the bias (C) of its output layer; no bias for None.
        target: class indices (N), or soft labels (N, C).
        counted: where the soft term counts, (N); everywhere for None.
        weights: those of the terms.
    """
    labelled, rows = None if target.is_floating_point() else target != IGNORED, hidden[0][:, :1]
    hard = weights.hard / (count_of(labelled, rows) if weights.mean else 1)
    soft: Tensor | float = weights.soft / (count_of(counted, rows) if weights.mean else 1)
    if counted is not None:
        soft = (soft * counted.to(wide(rows))).unsqueeze(1)
    matrices, biases = [weight for weight, _ in layers], [bias for _, bias in layers]
    total: Tensor = _FromHidden.apply(
        hard, soft, weights.temperature, target, len(hidden), *hidden, *matrices, *biases
    )
    return total


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hard: Tensor | float,
        soft: Tensor | float,
        temperature: float,
        target: Tensor,
        heads: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        """The loss; gradients of hidden states are kept in their type, those of output layers in float32 or wider."""
        hidden: Any = tensors[:heads]  # under autocast output layers have another type
        others: Any = [t if t is None else t.to(hidden[0].dtype) for t in tensors[heads:]]
        weight, bias = others[:heads], others[heads:]
        need = ctx.needs_input_grad[5:]
        types = [t.dtype if t is not None and i < heads else wide(hidden[0]) for i, t in enumerate(tensors)]
        ctx.gradients = [
            torch.zeros_like(tensor, dtype=dtype) if needed and tensor is not None else None
            for tensor, needed, dtype in zip(tensors, need, types, strict=True)
        ]
        total, share = hidden[0].new_zeros((), dtype=wide(hidden[0])), 1 / ((heads - 1) * temperature)
        step = max(1, AT_A_TIME // len(weight[0]))
        for start in range(0, len(hidden[0]), step):
            rows = slice(start, start + step)
            parts = [F.linear(h[rows], w, b).to(total.dtype) for h, w, b in zip(hidden, weight, bias, strict=True)]
            teachers = [torch.softmax(others * share, 1) for others in sums_of_others(parts)]
            of_rows = temperature * (soft[rows] if isinstance(soft, Tensor) else soft)
            for head, (z, q) in enumerate(zip(parts, teachers, strict=True)):
                gradient = torch.empty_like(z)
                total += of_head(z, q, target[rows], hard, of_rows, temperature, gradient)
                own = gradient.to(hidden[head].dtype)
                of_hidden, of_weight, of_bias = (ctx.gradients[kind * heads + head] for kind in range(3))
                if of_hidden is not None:
                    torch.mm(own, weight[head], out=of_hidden[rows])
                if of_weight is not None:
                    of_weight += own.t() @ hidden[head][rows]
                if of_bias is not None:
                    of_bias += gradient.sum(0)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in tensors]
        loss: Tensor = total
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()
        scaled = (None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        found = [None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.types, strict=True)]
        return None, None, None, None, None, *found
