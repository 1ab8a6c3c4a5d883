"""What the outputs of heads mean: how they are compared with labels, and with each other.

A task names its usual loss on the labels (J_hard of equation 3), how a head learns from a teacher's output (J_soft),
and which targets fit. The soft term of a task is the cross entropy between the teacher's distribution and the head's,
both at a temperature T, times T^2: that factor keeps it in balance with the loss on the labels when T changes
(section 3.3 of the paper).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError, closest
from fxcollab.objectives.outputs import described, is_concrete

HardLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A loss on the labels: (logits, target) to a scalar."""

IGNORED = -100
"""The label that cross entropy leaves out unless told otherwise."""

Reduction: TypeAlias = Literal["mean", "sum"]

V = TypeVar("V")


class Task(ABC):
    """What outputs mean.

    Args:
        hard: the loss on the labels; None for the task's usual one.
        reduction: over batch and positions.
    """

    name: str
    usual: type[nn.Module]
    linear: bool = True
    """Whether the soft term towards a mean of distributions is the mean of those towards each."""

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
    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """What a teacher's output says at a temperature, shaped like it."""

    @abstractmethod
    def towards(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """J_soft of a head's output ``z`` towards a distribution, times T^2; a scalar."""

    def soft(self, teacher: Tensor, z: Tensor, temperature: float) -> Tensor:
        """J_soft of a head's output ``z`` towards a teacher's, times T^2; a scalar."""
        return self.towards(self.distribution(teacher, temperature), z, temperature)

    def divergences(self, teacher: Tensor, heads: Sequence[Tensor], temperature: float) -> list[Tensor]:
        """The KL divergence of each head's output from a teacher's, times T^2: J_soft less the teacher's entropy."""
        entropy = self.soft(teacher, teacher, temperature)
        return [self.soft(teacher, z, temperature) - entropy for z in heads]

    @property
    def known(self) -> bool:
        """Whether the loss on the labels is one whose targets are known."""
        return type(self.hard) is self.usual

    def target(self, target: Tensor, z: Tensor) -> Tensor:
        """The target, checked where the loss on the labels is a known one: what others take is their own affair.

        Raises:
            ObjectiveError: it doesn't fit the logits ``z``.
        """
        if not self.known:
            return target
        if isinstance(target, Tensor) and target.device != z.device:
            raise ObjectiveError(
                f"The target is on {target.device}, the logits are on {z.device}.",
                hint=f"target.to({str(z.device)!r})",
            )
        if isinstance(target, Tensor) and self.fits(target, z):
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
        if not self.known:
            return target
        if target.is_floating_point():
            return target.to(z.dtype)
        self._require_classes(target, z.shape[1])
        return target.long() if target.dtype == torch.uint8 else target  # torch refuses dense uint8 ones

    def _require_classes(self, target: Tensor, classes: int) -> None:
        """Refuse indices of no class. On an accelerator nobody waits for the answer: torch says it there."""
        if target.device.type != "cpu" or not is_concrete(target):
            return
        ignored = ignored_label(self.hard)
        wrong = target[((target < 0) | (target >= classes)) & (target != ignored)]
        if len(wrong):
            raise ObjectiveError(
                f"The target holds {wrong[0].item()}, and the logits have the classes 0 to {classes - 1}.",
                why=f"{len(wrong)} of {target.numel()} labels are indices of no class",
                hint="Look at the labels and at the network's number of classes; labels that say nothing are left "
                f"out by hard=nn.CrossEntropyLoss(ignore_index={wrong[0].item()}).",
            )

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

    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """The softmax of equation 2."""
        return F.softmax(teacher / temperature, dim=1)

    def towards(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The cross entropy of equation 3, summed over classes."""
        return temperature**2 * F.cross_entropy(z / temperature, q, reduction=self.reduction)


class _Elementwise(Task):
    """Every value of the output stands for itself: (N), (N, L) or more dimensions."""

    @property
    def known(self) -> bool:
        """Whether the loss on the labels is one of torch's for the task: none of them may broadcast."""
        return isinstance(self, _task_class(self.hard) or ())

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

    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """The sigmoid at the temperature."""
        return torch.sigmoid(teacher / temperature)

    def towards(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The binary cross entropy at the temperature, reduced over labels as over samples."""
        return temperature**2 * F.binary_cross_entropy_with_logits(z / temperature, q, reduction=self.reduction)


class Regression(_Elementwise):
    """Numbers. Outputs are (N), (N, D), or of any shape with the batch first."""

    name = "regression"
    usual = nn.MSELoss

    linear = False

    def distribution(self, teacher: Tensor, temperature: float) -> Tensor:
        """The output itself: there is no temperature to it."""
        return teacher

    def towards(self, q: Tensor, z: Tensor, temperature: float) -> Tensor:
        """The loss on the labels with the teacher's output as label; squared error where that loss is your own."""
        return self.hard(z, q) if self.known else F.mse_loss(z, q, reduction=self.reduction)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, MultiLabel, Regression)}

_TASK_OF: dict[object, type[Task]] = {
    nn.CrossEntropyLoss: Classification,
    F.cross_entropy: Classification,
    nn.BCEWithLogitsLoss: MultiLabel,
    F.binary_cross_entropy_with_logits: MultiLabel,
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
    nn.KLDivLoss: "nn.CrossEntropyLoss(), which takes soft labels,",
    F.kl_div: "nn.CrossEntropyLoss(), which takes soft labels,",
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
        kind = _task_class(hard) or _unless_unclear(hard)
    elif name in TASKS:
        kind = TASKS[name]
    else:
        raise ObjectiveError(
            f"There is no task {name!r}.", hint=f"Tasks are {closest(name, TASKS) or ', '.join(TASKS)}."
        )
    return kind(hard, "mean" if reduction == "mean" else "sum")


def is_plain_cross_entropy(hard: HardLoss) -> bool:
    """Whether it is the usual loss of classes, with no option but the reduction."""
    if type(hard) is not nn.CrossEntropyLoss:
        return False
    return hard.weight is None and hard.label_smoothing == 0 and hard.ignore_index == IGNORED


def ignored_label(hard: HardLoss) -> int:
    """The label that a loss of classes leaves out: by an attribute or a bound argument, else torch's own."""
    inner: object = hard
    while isinstance(inner, partial):
        if "ignore_index" in inner.keywords:
            return int(inner.keywords["ignore_index"])
        inner = inner.func
    return int(getattr(_unwrapped(inner), "ignore_index", IGNORED))


def _require_loss(hard: HardLoss, reduction: str) -> None:
    if isinstance(hard, type) or not callable(hard):
        raise ObjectiveError(
            f"hard must be a callable (logits, target) to a scalar, not {hard!r}.",
            hint="Hand in an instance or a function, as in hard=nn.CrossEntropyLoss(label_smoothing=0.1).",
        )
    instead = _found(_INSTEAD, hard)
    if instead is not None:
        raise ObjectiveError(
            f"hard takes logits, not what {getattr(hard, '__name__', type(hard).__name__)} does.",
            why="Heads learn from each other's logits, which must not be probabilities yet.",
            hint=f"Leave the last softmax, log-softmax or sigmoid out of the model, and use {instead}.",
        )
    own = _own_reduction(hard) or reduction
    if own in ("mean", "sum", "none") and own != reduction:
        raise ObjectiveError(
            f"The hard loss has reduction {own!r}, the soft one {reduction!r}.",
            why="The two can't be balanced when only one of them grows with the batch.",
            hint=f"Give the hard loss reduction={reduction!r}.",
        )


def _task_class(hard: HardLoss | None) -> type[Task] | None:
    """The task that a loss of torch's, or a subclass or a partial of one, belongs to."""
    found = _found(_TASK_OF, hard)
    assert found is None or isinstance(found, type)
    return found


def _unless_unclear(hard: HardLoss | None) -> type[Task]:
    """Classification, unless it is another of torch's losses."""
    inner = _unwrapped(hard)
    if type(inner).__module__ == nn.CrossEntropyLoss.__module__ and type(inner) is not nn.MultiMarginLoss:
        raise ObjectiveError(
            f"What task {type(inner).__name__} is for can't be told.",
            why="Heads learn from each other by softmax, by sigmoid or by the mean.",
            hint=f"Name the task: {', '.join(f'task={name!r}' for name in TASKS)}.",
        )
    return Classification


def _found(table: Mapping[object, V], hard: HardLoss | None) -> V | None:
    inner = _unwrapped(hard)
    kinds = type(inner).__mro__ if isinstance(inner, nn.Module) else (inner,)
    return next((table[kind] for kind in kinds if kind in table), None)


def _unwrapped(hard: object) -> object:
    """The loss inside ``functools.partial`` and ``torch.compile``."""
    while True:
        inner = hard.func if isinstance(hard, partial) else getattr(hard, "_orig_mod", None)
        if inner is None:
            return hard
        hard = inner


def _own_reduction(hard: HardLoss) -> str | None:
    """How a loss reduces, where it says so: by an attribute, a bound argument or a default."""
    own = getattr(hard, "reduction", None)
    if own is None and callable(hard):
        with suppress(TypeError, ValueError):
            parameter = inspect.signature(hard).parameters.get("reduction")
            own = parameter and parameter.default
    return own if isinstance(own, str) else None


def _positions(z: Tensor) -> tuple[int, ...]:
    return (z.shape[0], *z.shape[2:])
