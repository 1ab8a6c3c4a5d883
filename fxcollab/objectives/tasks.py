"""What the outputs of heads mean: how they are compared with labels, and with each other.

A task names its usual loss on the labels (J_hard of equation 3), how a head learns from a teacher's output (J_soft),
and which targets fit. The soft term of a task is the cross entropy between the teacher's distribution and the head's,
both at a temperature T, times T^2: that factor keeps it in balance with the loss on the labels when T changes
(section 3.3 of the paper).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError, closest
from fxcollab.objectives.outputs import described

HardLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A loss on the labels: (logits, target) to a scalar."""

Reduction: TypeAlias = Literal["mean", "sum"]


class Task(ABC):
    """What outputs mean.

    Args:
        hard: the loss on the labels; None for the task's usual one.
        reduction: over batch and positions.
    """

    name: str
    usual: type[nn.Module]

    def __init__(self, hard: HardLoss | None, reduction: Reduction) -> None:
        self.reduction = reduction
        self.hard: HardLoss = self.usual(reduction=reduction) if hard is None else hard

    @abstractmethod
    def require_logits(self, z: Tensor) -> None:
        """Refuse logits of a shape that the task doesn't know, by an `ObjectiveError`."""

    @abstractmethod
    def fits(self, target: Tensor, z: Tensor) -> bool:
        """Whether the usual loss takes ``target`` beside the logits ``z``."""

    @abstractmethod
    def refusal(self, target: object, z: Tensor) -> tuple[str, str]:
        """What a target must be, and the way out for this one."""

    @abstractmethod
    def soft(self, teacher: Tensor, z: Tensor, temperature: float) -> Tensor:
        """J_soft of a head's logits ``z`` towards a teacher's, times T^2; a scalar."""

    def target(self, target: Tensor, z: Tensor) -> Tensor:
        """The target, checked where the loss on the labels is the usual one: what others take is their own affair.

        Raises:
            ObjectiveError: it doesn't fit the logits ``z``.
        """
        if type(self.hard) is not self.usual or (isinstance(target, Tensor) and self.fits(target, z)):
            return target
        why, hint = self.refusal(target, z)
        raise ObjectiveError(
            f"The target is {described(target)} and doesn't fit logits of shape {tuple(z.shape)}.", why=why, hint=hint
        )


class Classification(Task):
    """One class of C: softmax. Logits are (N, C), or (N, C, d1, ...) for dense predictions."""

    name = "classification"
    usual = nn.CrossEntropyLoss

    def require_logits(self, z: Tensor) -> None:  # noqa: D102  # as the base says
        if z.dim() < 2:
            raise ObjectiveError(
                f"Logits are floating point tensors (N, C) or (N, C, d1, ...), not {described(z)}.",
                hint="Dimension 0 is the batch, dimension 1 the classes; z.unsqueeze(0) makes a batch of one. "
                'One yes or no a sample is task="multi-label".',
            )

    def fits(self, target: Tensor, z: Tensor) -> bool:  # noqa: D102
        if target.shape == z.shape:
            return target.is_floating_point()
        return target.shape == _positions(z) and target.dtype in (torch.int64, torch.uint8)

    def target(self, target: Tensor, z: Tensor) -> Tensor:  # noqa: D102
        target = super().target(target, z)
        takes_indices = type(self.hard) is self.usual and target.dtype == torch.uint8
        return target.long() if takes_indices else target  # torch refuses dense uint8 ones

    def refusal(self, target: object, z: Tensor) -> tuple[str, str]:  # noqa: D102
        positions = _positions(z)
        why = f"It must be class indices of shape {positions}, or soft labels of shape {tuple(z.shape)}."
        if not isinstance(target, Tensor):
            return why, "Make it a tensor: torch.as_tensor(target)."
        if target.shape == z.shape:
            return why, "Soft labels are floating point: target.float()."
        if target.shape == positions:
            return why, "Class indices are integers: target.long()."
        if target.dim() > 1 and target.shape[1] == 1 and target.squeeze(1).shape == positions:
            return why, "Drop the dimension of size 1: target.squeeze(1).long()."
        return why, "Dimension 0 of the logits is the batch, dimension 1 the classes, the rest are positions."

    def soft(self, teacher: Tensor, z: Tensor, temperature: float) -> Tensor:
        """Equation 3 with the softmax of equation 2, summed over classes."""
        q = F.softmax(teacher / temperature, dim=1)
        return temperature**2 * F.cross_entropy(z / temperature, q, reduction=self.reduction)


class _Elementwise(Task):
    """Every value of the output stands for itself: (N), (N, L) or more dimensions."""

    def require_logits(self, z: Tensor) -> None:
        if z.dim() < 1:
            raise ObjectiveError(
                f"Outputs have the batch in dimension 0, this is {described(z)}.",
                hint="z.unsqueeze(0) makes a batch of one.",
            )

    def fits(self, target: Tensor, z: Tensor) -> bool:
        return target.shape == z.shape and target.is_floating_point()

    def refusal(self, target: object, z: Tensor) -> tuple[str, str]:
        why = f"It must be floating point and of shape {tuple(z.shape)}; nothing is broadcast."
        if not isinstance(target, Tensor):
            return why, "Make it a tensor: torch.as_tensor(target)."
        if target.shape == z.shape:
            return why, "Make it floating point: target.float()."
        if target.numel() == z.numel():
            return why, "Give it the shape of the outputs: target.view_as(output)."
        return why, "One value of the target belongs to one of the output."


class MultiLabel(_Elementwise):
    """A yes or no for every value: sigmoid. Logits are (N, L), or of any shape with the batch first."""

    name = "multi-label"
    usual = nn.BCEWithLogitsLoss

    def soft(self, teacher: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The binary cross entropy at the temperature, reduced over labels as over samples."""
        q = torch.sigmoid(teacher / temperature)
        return temperature**2 * F.binary_cross_entropy_with_logits(z / temperature, q, reduction=self.reduction)


class Regression(_Elementwise):
    """Numbers. Outputs are (N), (N, D), or of any shape with the batch first."""

    name = "regression"
    usual = nn.MSELoss

    def soft(self, teacher: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The loss on the labels with the teacher's output as label; there is no temperature to it."""
        return self.hard(z, teacher)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, MultiLabel, Regression)}

_TASK_OF: dict[object, type[Task]] = {
    nn.BCEWithLogitsLoss: MultiLabel,
    nn.MultiLabelSoftMarginLoss: MultiLabel,
    F.binary_cross_entropy_with_logits: MultiLabel,
    F.multilabel_soft_margin_loss: MultiLabel,
    nn.MSELoss: Regression,
    nn.L1Loss: Regression,
    nn.SmoothL1Loss: Regression,
    nn.HuberLoss: Regression,
    F.mse_loss: Regression,
    F.l1_loss: Regression,
    F.smooth_l1_loss: Regression,
    F.huber_loss: Regression,
}
_INSTEAD: dict[object, str] = {
    nn.BCELoss: "nn.BCEWithLogitsLoss()",
    F.binary_cross_entropy: "nn.BCEWithLogitsLoss()",
    nn.NLLLoss: "nn.CrossEntropyLoss()",
    F.nll_loss: "nn.CrossEntropyLoss()",
}


def task_of(name: str | None, hard: HardLoss | None, reduction: str) -> Task:
    """The task of that name; where there is none, the one to which the loss on the labels belongs.

    Args:
        name: "classification", "multi-label" or "regression"; None to go by ``hard``.
        hard: the loss on the labels; None for the task's usual one.
        reduction: "mean" or "sum".

    Raises:
        ObjectiveError: there is no such task, ``hard`` is no loss of logits, or reduces otherwise.
    """
    if reduction not in ("mean", "sum"):
        raise ObjectiveError(
            f"The reduction must be 'mean' or 'sum', not {reduction!r}.",
            hint="The loss is one scalar over all heads; 'mean' is the usual choice.",
        )
    if hard is not None:
        _require_loss(hard, reduction)
    if name is None:
        kind = _TASK_OF.get(_kind(hard), Classification)
    elif name in TASKS:
        kind = TASKS[name]
    else:
        raise ObjectiveError(
            f"There is no task {name!r}.", hint=f"Tasks are {closest(name, TASKS) or ', '.join(TASKS)}."
        )
    return kind(hard, "mean" if reduction == "mean" else "sum")


def _require_loss(hard: HardLoss, reduction: str) -> None:
    if isinstance(hard, type) or not callable(hard):
        raise ObjectiveError(
            f"hard must be a callable (logits, target) to a scalar, not {hard!r}.",
            hint="Hand in an instance or a function, as in hard=nn.CrossEntropyLoss(label_smoothing=0.1).",
        )
    instead = _INSTEAD.get(_kind(hard))
    if instead is not None:
        raise ObjectiveError(
            f"hard takes logits, not what {getattr(hard, '__name__', type(hard).__name__)} does.",
            why="Heads learn from each other's logits, which must not be probabilities yet.",
            hint=f"Leave the last softmax, log-softmax or sigmoid out of the model, and use {instead}.",
        )
    own = getattr(hard, "reduction", reduction)
    if own in ("mean", "sum", "none") and own != reduction:
        raise ObjectiveError(
            f"The hard loss has reduction {own!r}, the soft one {reduction!r}.",
            why="The two can't be balanced when only one of them grows with the batch.",
            hint=f"Give the hard loss reduction={reduction!r}.",
        )


def _kind(hard: HardLoss | None) -> object:
    return type(hard) if isinstance(hard, nn.Module) else hard


def _positions(z: Tensor) -> tuple[int, ...]:
    return (z.shape[0], *z.shape[2:])
