"""What the outputs of heads are: how they are compared with labels, and with each other.

A task has its usual loss on the labels (J_hard of equation 3), the soft loss by which a head learns from a teacher's
output (J_soft), and a check that targets fit. The soft loss is the cross entropy between the distributions of teacher
and head, both at a temperature T, times T^2: that factor keeps it in balance with the loss on the labels when T
changes (section 3.3 of the paper).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError, closest
from fxcollab.objectives.hard_loss import (
    HardLoss,
    found,
    ignored_label,
    option_of,
    require_loss,
    unreduced,
    unwrapped,
)
from fxcollab.objectives.outputs import described, is_concrete


class Task(ABC):
    """What the outputs are, and how they are compared.

    Args:
        hard: the loss on the labels; None for the task's usual one.
        reduction: "mean", "sum" or "none" over batch and positions.
    """

    name: str
    losses: tuple[Any, ...]
    """Torch's losses on the labels for this task; the first is the default."""
    linear: bool = True
    """Whether the soft term towards a mean of distributions is the mean of those towards each."""
    shape: str
    """The shape of outputs."""
    dims: int
    """The least number of dimensions of outputs."""
    weight: str = ""
    """The option of the losses that weighs classes, if there is one."""

    def __init__(self, hard: HardLoss | None, reduction: str) -> None:
        self.hard: HardLoss = self.losses[0](reduction=reduction) if hard is None else hard
        self._weighs_classes = False

    @abstractmethod
    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """The distribution of a teacher's output at a temperature, shaped like it."""

    @abstractmethod
    def soft_loss(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """J_soft of a head's output ``z`` towards a distribution, times T^2, at every position."""

    @abstractmethod
    def positions(self, z: Tensor) -> tuple[int, ...]:
        """The shape of a loss of outputs ``z`` that isn't reduced: one value for every position."""

    def labelled(self, target: Tensor, z: Tensor) -> Tensor | None:
        """Which positions have a label, by a mask; None where all have."""
        return None

    def weigh_classes(self, on: bool) -> None:
        """Whether the soft loss weighs classes as the loss on the labels does.

        Raises:
            ObjectiveError: that has no weights.
        """
        if on and not self.has_class_weights:
            raise ObjectiveError(
                f"The soft term can't weigh classes as hard does, which has no {self.weight or 'weights'}.",
                hint="As in hard=nn.CrossEntropyLoss(weight=...), class_weights=True.",
            )
        self._weighs_classes = on

    def class_weights(self, z: Tensor) -> Tensor | None:
        """The weights of classes in the soft loss, in the type of logits ``z``."""
        return option_of(self.hard, self.weight, None).to(z.dtype) if self._weighs_classes else None

    @property
    def has_class_weights(self) -> bool:
        """Whether the loss on the labels weighs classes."""
        return option_of(self.hard, self.weight, None) is not None

    def nothing(self, z: Tensor) -> Tensor:
        """A loss of 0 at every position, whose gradient is 0."""
        return (z * 0).sum(1) if z.shape != self.positions(z) else z * 0

    @abstractmethod
    def expected(self, z: Tensor) -> str:
        """What the target of the loss on the labels must be, for errors."""

    @abstractmethod
    def misfit(self, target: Tensor, z: Tensor) -> str | None:
        """How to correct a target that doesn't fit the logits ``z``; None for one that does."""

    @property
    @abstractmethod
    def known(self) -> bool:
        """Whether the loss on the labels is one of torch's, whose targets can be checked."""

    def require_logits(self, z: Tensor) -> None:
        """Raise an `ObjectiveError` where logits have too few dimensions."""
        if z.dim() < self.dims:
            raise ObjectiveError(
                f"The outputs of a {self.name} task have the shape {self.shape}, this is {described(z)}.",
                hint="Dimension 0 is the batch; z.unsqueeze(0) makes a batch of one. For one yes or no per sample "
                'pass task="multi-label".',
            )

    def distillation(self, teacher: Tensor, z: Tensor, temperature: float) -> Tensor:
        """J_soft of a head's output ``z`` towards a teacher's, times T^2, at every position."""
        return self.soft_loss(self.distribution(teacher, temperature), z, temperature)

    def divergences(self, teacher: Tensor, heads: Sequence[Tensor], temperature: float) -> list[Tensor]:
        """The KL divergence of each head's output from a teacher's, times T^2: J_soft less the teacher's entropy."""
        entropy = self.distillation(teacher, teacher, temperature)
        return [self.distillation(teacher, z, temperature) - entropy for z in heads]

    def target(self, target: Tensor, z: Tensor) -> Tensor:
        """The target for logits ``z``, checked where the loss on the labels is a known one.

        Raises:
            ObjectiveError: it doesn't fit the logits.
        """
        if not self.known:
            return target
        if isinstance(target, Tensor) and target.device != z.device:
            raise ObjectiveError(
                f"The target is on {target.device}, the logits are on {z.device}.",
                hint=f"target.to({str(z.device)!r})",
            )
        hint = self.misfit(target, z) if isinstance(target, Tensor) else "Make it a tensor: torch.as_tensor(target)."
        if hint is not None:
            raise ObjectiveError(
                f"The target is {described(target)} and doesn't fit logits of shape {tuple(z.shape)}.",
                why=f"It must be {self.expected(z)}.",
                hint=hint,
            )
        return target


class Classification(Task):
    """One class of C: softmax."""

    name = "classification"
    losses = (nn.CrossEntropyLoss, F.cross_entropy, nn.MultiMarginLoss, F.multi_margin_loss)
    shape = "(N, C), or (N, C, d1, ...) for dense predictions"
    weight = "weight"
    dims = 2

    def require_logits(self, z: Tensor) -> None:
        """Raise an `ObjectiveError` also for a single class, whose softmax is 1 whatever the logits are."""
        super().require_logits(z)
        if z.shape[1] == 1:
            raise ObjectiveError(
                f"A classification has two classes or more, these are logits of one: {described(z)}.",
                why="Dimension 1 holds the classes, and the softmax over one is 1: heads would learn nothing.",
                hint='For one yes or no per sample or position pass task="multi-label".',
            )

    @property
    def known(self) -> bool:  # noqa: D102  # as the base says
        return type(self.hard) is nn.CrossEntropyLoss

    def expected(self, z: Tensor) -> str:  # noqa: D102
        return f"class indices of shape {positions(z)}, or soft labels of shape {tuple(z.shape)}"

    def misfit(self, target: Tensor, z: Tensor) -> str | None:  # noqa: D102
        indices = positions(z)
        if target.shape == z.shape:
            return None if target.is_floating_point() else "Soft labels are floating point: target.float()."
        if target.shape == indices:
            fits = target.dtype in (torch.int64, torch.uint8)
            return None if fits else "Class indices are integers: target.long()."
        if target.dim() > 1 and target.shape[1] == 1 and target.squeeze(1).shape == indices:
            return "Drop the dimension of size 1: target.squeeze(1).long()."
        if z.dim() == 3 and target.shape == z.shape[:2]:
            return "For logits of tokens, (N, T, V), pass tokens='shifted' (a causal model) or tokens='aligned'."
        return "Dimension 0 of the logits is the batch, dimension 1 the classes, the rest are positions."

    def target(self, target: Tensor, z: Tensor) -> Tensor:  # noqa: D102
        target = super().target(target, z)
        if not self.known:
            return target
        if target.is_floating_point():
            return target.to(torch.promote_types(z.dtype, torch.float32))
        target = target.long() if target.dtype == torch.uint8 else target  # torch doesn't take dense uint8 ones
        if target.device.type == "cpu" and is_concrete(target):  # an accelerator would wait; torch checks it there
            self._require_classes(target, z.shape[1])
        return target

    def _require_classes(self, target: Tensor, classes: int) -> None:
        wrong = target[((target < 0) | (target >= classes)) & (target != ignored_label(self.hard))]
        if len(wrong):
            raise ObjectiveError(
                f"The target holds {wrong[0].item()}, and the logits have the classes 0 to {classes - 1}.",
                why=f"{len(wrong)} of {target.numel()} labels are out of range",
                hint="Look at the labels and at the network's number of classes; a label that marks missing ones is "
                f"left out by hard=nn.CrossEntropyLoss(ignore_index={wrong[0].item()}).",
            )

    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """The softmax of equation 2."""
        return F.softmax(teacher / temperature, dim=1)

    def soft_loss(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The cross entropy of equation 3, summed over classes."""
        return temperature**2 * F.cross_entropy(z / temperature, q, self.class_weights(z), reduction="none")

    def positions(self, z: Tensor) -> tuple[int, ...]:  # noqa: D102
        return positions(z)

    def labelled(self, target: Tensor, z: Tensor) -> Tensor | None:
        """Which positions have a class index that isn't ignored; None for soft labels, and for others of your own."""
        if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != positions(z):
            return None
        return target != ignored_label(self.hard)


class _Elementwise(Task):
    """Every value of the output has a target of its own."""

    shape = "(N), (N, L) or any other with the batch first"
    dims = 1

    @property
    def known(self) -> bool:
        return isinstance(self, found(_TASK_OF, self.hard) or ())

    def positions(self, z: Tensor) -> tuple[int, ...]:
        return tuple(z.shape)

    def expected(self, z: Tensor) -> str:
        return f"floating point and of shape {tuple(z.shape)}; nothing is broadcast"

    def misfit(self, target: Tensor, z: Tensor) -> str | None:
        if target.shape == z.shape:
            return None if target.is_floating_point() else "Make it floating point: target.float()."
        if target.numel() == z.numel():
            return "Give it the shape of the outputs: target.view_as(output)."
        return "Every value of the output needs a value of the target."


class MultiLabel(_Elementwise):
    """A yes or no for every value: sigmoid."""

    name = "multi-label"
    losses = (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)
    weight = "pos_weight"

    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """The sigmoid at the temperature."""
        return torch.sigmoid(teacher / temperature)

    def soft_loss(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The binary cross entropy at the temperature."""
        z, weight = z / temperature, self.class_weights(z)
        return temperature**2 * F.binary_cross_entropy_with_logits(z, q, pos_weight=weight, reduction="none")


class Regression(_Elementwise):
    """Numbers."""

    name = "regression"
    losses = (
        *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
        *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    )
    linear = False

    def __init__(self, hard: HardLoss | None, reduction: str) -> None:
        super().__init__(hard, reduction)
        self._soft = unreduced(self.hard) if self.known else partial(F.mse_loss, reduction="none")

    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """The output itself; a regression has no temperature."""
        return teacher

    def soft_loss(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The loss on the labels with the teacher's output as label; squared error where that loss is your own."""
        return self._soft(z, q)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, MultiLabel, Regression)}

_TASK_OF: dict[Any, type[Task]] = {loss: task for task in TASKS.values() for loss in task.losses}


def task_of(name: str | None, hard: HardLoss | None, reduction: str) -> Task:
    """The task of that name; without a name the one that the loss on the labels belongs to.

    Raises:
        ObjectiveError: there is no such task, ``hard`` is not a loss of logits, or reduces otherwise.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ObjectiveError(
            f"The reduction must be 'mean', 'sum' or 'none', not {reduction!r}.",
            hint="The usual choice is 'mean': one scalar over all heads.",
        )
    if hard is not None:
        require_loss(hard, reduction)
    if name is not None and (not isinstance(name, str) or name not in TASKS):
        raise ObjectiveError(
            f"There is no task {name!r}.", hint=f"Tasks are {closest(str(name), TASKS) or ', '.join(TASKS)}."
        )
    inner = unwrapped(hard)
    kind = TASKS[name] if name is not None else found(_TASK_OF, hard)
    if kind is None and type(inner).__module__ == nn.modules.loss.__name__:
        raise ObjectiveError(
            f"The task of {type(inner).__name__} is ambiguous.",
            why="Heads learn from each other by softmax, by sigmoid or by the mean.",
            hint=f"Name the task: {', '.join(f'task={name!r}' for name in TASKS)}.",
        )
    if kind is None and hard is not None:
        raise ObjectiveError(
            f"It isn't known what {getattr(hard, '__qualname__', type(hard).__qualname__)} compares.",
            why="Heads learn from each other by softmax, by sigmoid or by the mean, as the labels are.",
            hint=f"Name the task: {', '.join(f'task={name!r}' for name in TASKS)}.",
        )
    return (kind or Classification)(hard, reduction)


def positions(z: Tensor) -> tuple[int, ...]:
    """The shape of class indices for logits (N, C, d1, ...)."""
    return (z.shape[0], *z.shape[2:])
