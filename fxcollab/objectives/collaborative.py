"""The objective of collaborative learning: equations 2 to 4 of the paper, summed over the heads.

    q_h = softmax(mean of the other heads' logits / T)                             (2)
    L_h = beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q_h, z_h)              (3)
    L   = L_1 + ... + L_H                                                          (4)

The regularisation term of equation 4 is the optimizer's weight decay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError, closest

HardLoss = Callable[[Tensor, Tensor], Tensor]
"""A classification loss: (logits, target) to a scalar."""


def consensus(logits: Sequence[Tensor]) -> list[Tensor]:
    """For every head, the mean of the other heads' logits (the argument of q in section 3.2 of the paper).

    The logits are summed once, so that the cost grows linearly with the number of heads.

    Args:
        logits: one tensor per head, at least two, all of one shape.

    Returns:
        One tensor per head, shaped like the logits. Gradient flows through it to the other heads: detach the
        logits to stop it.

    Raises:
        ObjectiveError: there are fewer than two heads, or their shapes differ.
    """
    if len(logits) < 2:
        raise ObjectiveError(
            f"A consensus takes at least 2 heads, not {len(logits)}.",
            why="Each head learns from the mean of the others.",
            hint="Train with more heads, or on the labels alone: CollaborativeLoss(beta=1).",
        )
    _require_one_shape(logits)
    total, others = _total(logits), len(logits) - 1
    return [(total - z) / others for z in logits]


class CollaborativeLoss(nn.Module):
    """The loss of collaborative learning: each head learns from the labels and from all other heads.

    The total over the heads h of ``beta * J_hard(y, z_h) + (1 - beta) * T^2 * J_soft(q_h, z_h)`` (equations
    3 and 4). J_hard is the loss on the labels. J_soft is the cross entropy at temperature T between head h
    and the consensus q_h, the softmax of the other heads' mean logits (equation 2). The factor T^2 keeps the
    balance of the two when T changes (section 3.3).

    The soft term is summed over the classes and averaged over batch and positions. It asks for no label, so
    that positions which ``hard`` ignores (``ignore_index``) count in it like any other.

    Half-precision logits are converted to float32, for ``hard`` too; float64 stays float64.

    Args:
        beta: weight of the labels against the consensus, in (0, 1]. With 1 nothing is shared: the soft term
            is left out and a single head will do.
        temperature: T, finite and above 0. Higher is softer.
        detach: whether the consensus is a constant. With False gradient flows through it to the other heads.
        hard: the loss on the labels, any callable (logits, target) to a scalar. The default is cross entropy;
            ``nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=255)`` is one with options.
        logits: name of the field that holds the logits, where a head's output is a structure: "logits" for
            transformers, "out" for torchvision's segmentation models.
        reduction: "mean" or "sum" over batch and positions. ``hard`` must reduce in the same way.

    Raises:
        ObjectiveError: a value is out of its range, or ``hard`` is no loss or reduces otherwise.

    Example:
        >>> loss = CollaborativeLoss(beta=0.5, temperature=2.0)(train_model(x), target)
        >>> loss.backward()
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 2.0,
        *,
        detach: bool = True,
        hard: HardLoss | None = None,
        logits: str = "logits",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _require_range(beta, temperature)
        _require_reduction(reduction, hard)
        self.beta = beta
        self.temperature = temperature
        self.detach = detach
        self.logits = logits
        self.reduction = reduction
        self.hard: HardLoss = nn.CrossEntropyLoss(reduction=reduction) if hard is None else hard

    def forward(self, outputs: Sequence[object], target: Tensor) -> Tensor:
        """The total loss of all heads (equation 4).

        Args:
            outputs: what a training model returns: a tuple or list with one entry per head, each a tensor of
                logits or a structure (mapping, named tuple, dataclass, any object) with a field of them.
                Logits are (N, C), or (N, C, d1, ...) for dense predictions, of one shape for all heads.
            target: class indices, (N) or (N, d1, ...), int64 or uint8; or soft labels, floating, shaped like
                the logits. With a ``hard`` other than ``nn.CrossEntropyLoss``: whatever that takes.

        Returns:
            A scalar.

        Raises:
            ObjectiveError: outputs or target don't have these forms, there are too few heads, or ``hard``
                doesn't return a scalar.
        """
        heads = self._logits_of_heads(outputs)
        if type(self.hard) is nn.CrossEntropyLoss:  # what another loss takes is its own affair
            _require_labels(target, heads[0])
            target = target.long() if target.dtype == torch.uint8 else target  # torch refuses dense uint8 ones
        hard = _total([self._hard(z, target) for z in heads])
        if self.beta == 1:
            return hard
        voters = [z.detach() for z in heads] if self.detach else heads
        soft = _total([self._soft(c, z) for c, z in zip(consensus(voters), heads, strict=True)])
        return self.beta * hard + (1 - self.beta) * self.temperature**2 * soft

    def _logits_of_heads(self, outputs: Sequence[object]) -> list[Tensor]:
        if not isinstance(outputs, tuple | list) or not outputs:
            raise ObjectiveError(
                f"The loss takes a tuple or list with one output per head, not {_described(outputs)}.",
                hint="Hand in what the training model returns; a single head as (output,), with beta=1.",
            )
        logits = [_logits_of(output, self.logits, head) for head, output in enumerate(outputs)]
        _require_one_shape(logits)
        return [_at_least_float32(z) for z in logits]

    def _hard(self, z: Tensor, target: Tensor) -> Tensor:
        loss = self.hard(z, target)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ObjectiveError(
                f"The hard loss returned {_described(loss)}, not a scalar.",
                hint=f'Reduce it over batch and positions, as reduction="{self.reduction}" does.',
            )
        return loss

    def _soft(self, c: Tensor, z: Tensor) -> Tensor:
        """J_soft of equation 3; ``c`` is the mean of the other heads' logits."""
        q = F.softmax(c / self.temperature, dim=1)
        return F.cross_entropy(z / self.temperature, q, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        options = (
            f"beta={self.beta}, temperature={self.temperature}, detach={self.detach}, "
            f"logits={self.logits!r}, reduction={self.reduction!r}"
        )
        # A module is printed as a child.
        return options if isinstance(self.hard, nn.Module) else f"{options}, hard={self.hard!r}"


def _total(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0])


def _at_least_float32(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _logits_of(output: object, field: str, head: int) -> Tensor:
    """The logits in one head's output, with class dimension 1."""
    z = _lookup(output, field)
    if not isinstance(z, Tensor):
        raise _no_logits(output, field, head)
    if z.dim() < 2 or not z.is_floating_point():
        raise ObjectiveError(
            f"Logits are floating point tensors (N, C) or (N, C, d1, ...), not {_described(z)}.",
            where=f"head {head}",
            hint="Dimension 0 is the batch, dimension 1 the classes; z.unsqueeze(0) makes a batch of one.",
        )
    return z


def _lookup(output: object, field: str) -> object:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get(field)
    return getattr(output, field, None)


def _no_logits(output: object, field: str, head: int) -> ObjectiveError:
    fields = _fields_of(output)
    kind = type(output).__name__
    others = [name for name in fields if name != field]
    if field in fields:
        why = f"{field!r} of this {kind} is {_described(_lookup(output, field))}."
    elif others:
        why = f"This {kind} has the fields {', '.join(others)}."
    else:
        why = f"This {kind} has no named fields."
    if others:
        guess = closest(field, others, count=1) or others[0]
        hint = f"Name the field that holds them, as in CollaborativeLoss(logits={guess!r})."
    else:
        hint = "Pick them yourself, as in loss([output[0] for output in outputs], target)."
    return ObjectiveError(
        f"The head's output has no logits under {field!r}.", where=f"head {head}", why=why, hint=hint
    )


def _fields_of(output: object) -> list[str]:
    if isinstance(output, Mapping):
        return [str(key) for key in output]
    if isinstance(output, tuple):
        return list(getattr(output, "_fields", ()))
    if dataclasses.is_dataclass(output):
        return [field.name for field in dataclasses.fields(output)]
    return list(getattr(output, "__dict__", ()))


def _described(value: object) -> str:
    """What a value is, for an error: its type, and for a tensor its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple | list) and not value:
        return f"an empty {type(value).__name__}"
    return "None" if value is None else f"of type {type(value).__name__}"


def _require_range(beta: float, temperature: float) -> None:
    if not 0 < beta <= 1:
        raise ObjectiveError(
            f"beta must be in (0, 1], not {beta}.",
            why="It weighs the labels against the consensus (equation 3); without labels nothing is learnt.",
            hint="The paper uses 0.5; 1 trains on the labels alone.",
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ObjectiveError(
            f"The temperature must be finite and above 0, not {temperature}.",
            why="The logits are divided by it (equation 2).",
            hint="The paper uses 2; 1 is the plain softmax.",
        )


def _require_reduction(reduction: str, hard: HardLoss | None) -> None:
    if reduction not in ("mean", "sum"):
        raise ObjectiveError(
            f"The reduction must be 'mean' or 'sum', not {reduction!r}.",
            hint="The loss is one scalar over all heads; 'mean' is the usual choice.",
        )
    if hard is None:
        return
    if isinstance(hard, type) or not callable(hard):
        raise ObjectiveError(
            f"hard must be a callable (logits, target) to a scalar, not {hard!r}.",
            hint="Hand in an instance or a function, as in hard=nn.CrossEntropyLoss(label_smoothing=0.1).",
        )
    own = getattr(hard, "reduction", reduction)
    if own in ("mean", "sum", "none") and own != reduction:
        raise ObjectiveError(
            f"The hard loss has reduction {own!r}, the soft one {reduction!r}.",
            why="beta can't balance the two when only one of them grows with the batch.",
            hint=f"Give the hard loss reduction={reduction!r}.",
        )


def _require_one_shape(logits: Sequence[Tensor]) -> None:
    first = logits[0]
    for head, z in enumerate(logits):
        if z.shape != first.shape:
            raise ObjectiveError(
                f"All heads must give logits of one shape, not {tuple(first.shape)} and {tuple(z.shape)}.",
                where=f"heads 0 and {head}",
                hint="Heads are instances of one network: give them the same input and the same classes.",
            )


def _require_labels(target: Tensor, z: Tensor) -> None:
    """Refuse a target that is neither class indices nor soft labels for the logits ``z``."""
    positions = (z.shape[0], *z.shape[2:])
    if isinstance(target, Tensor):
        if target.shape == z.shape and target.is_floating_point():
            return
        if target.shape == positions and target.dtype in (torch.int64, torch.uint8):
            return
    raise ObjectiveError(
        f"The target is {_described(target)} and doesn't fit logits of shape {tuple(z.shape)}.",
        why=f"It must be class indices of shape {positions}, or soft labels of shape {tuple(z.shape)}.",
        hint=_label_hint(target, z, positions),
    )


def _label_hint(target: object, z: Tensor, positions: tuple[int, ...]) -> str:
    if not isinstance(target, Tensor):
        return "Make it a tensor: torch.as_tensor(target)."
    if target.shape == z.shape:
        return "Soft labels are floating point: target.float()."
    if target.shape == positions:
        return "Class indices are integers: target.long()."
    if target.dim() > 1 and target.shape[1] == 1 and target.squeeze(1).shape == positions:
        return "Drop the dimension of size 1: target.squeeze(1).long()."
    return "Dimension 0 of the logits is the batch, dimension 1 the classes, the rest are positions."
