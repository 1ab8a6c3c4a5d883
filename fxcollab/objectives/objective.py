"""The base of all objectives over the heads: reading logits, the loss on the labels, the sum, the checks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.outputs import described, is_concrete, logits_of_heads
from fxcollab.objectives.tasks import HardLoss, Task, task_of


class Options(TypedDict, total=False):
    """The options of every `Objective`."""

    task: str | None
    hard: HardLoss | None
    logits: str
    reduction: str
    finite: bool


class Objective(nn.Module, ABC):
    """A loss that is a sum over heads (equation 4); `per_head` returns its terms.

    A subclass implements `losses`. Parameters that `losses` has after ``target`` are further arguments of the loss.

    Args:
        task: what the outputs are: "classification" (softmax), "multi-label" (sigmoid) or "regression". By default it
            follows from ``hard``: ``nn.BCEWithLogitsLoss()`` is multi-label, ``nn.MSELoss()`` and other regression
            losses of torch are regression, all others classification.
        hard: the loss on the labels, any callable (logits, target) to a scalar. The default is the task's usual one:
            cross entropy, binary cross entropy with logits, squared error.
        logits: name of the field that holds the logits, where a head's output is a structure: "logits" for
            transformers, "out" for torchvision's segmentation models.
        reduction: "mean" or "sum" over batch and positions. ``hard`` must reduce in the same way.
        finite: whether a loss that is not finite raises an error that names the head. The check waits for the device,
            and is skipped where the loss is compiled, captured or transformed by ``torch.func``. Turn it off under a
            gradient scaler, which skips such steps.

    Raises:
        ObjectiveError: an option is out of its range, or ``hard`` is not a loss of logits or reduces otherwise.
    """

    inputs: str = "the target"
    """What the loss is computed from beside the logits, for errors."""

    def __init__(
        self,
        *,
        task: str | None = None,
        hard: HardLoss | None = None,
        logits: str = "logits",
        reduction: str = "mean",
        finite: bool = True,
    ) -> None:
        super().__init__()
        self.task: Task = task_of(task, hard, reduction)
        self.hard: HardLoss = self.task.hard
        self.logits = logits
        self.reduction = reduction
        self.finite = finite

    def forward(self, outputs: Sequence[object], target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The total loss of all heads (equation 4).

        Args:
            outputs: what a training model returns: a tuple or list with one entry per head, each a tensor of
                logits or a structure (mapping, named tuple, dataclass, any object) with a field of them.
                Logits are (N, C), or (N, C, d1, ...) for dense predictions, of one shape for all heads; for a
                multi-label task or a regression any shape with the batch first.
            target: class indices, (N) or (N, d1, ...), int64 or uint8; or soft labels, floating point, shaped like
                the logits, as for the other tasks. With a ``hard`` of your own: whatever that takes.
            *args: further arguments: ``teachers`` of `DistillationLoss`, ``features`` of `ONELoss`.
            **kwargs: the same by name.

        Returns:
            A scalar.

        Raises:
            ObjectiveError: outputs or target don't have these forms, there are too few heads, ``hard`` doesn't
                return a scalar, or the loss isn't finite.
        """
        heads = self.heads(outputs)
        loss = self.total(heads, target, *args, **kwargs)
        if self.finite and is_concrete(loss) and not bool(torch.isfinite(loss)):
            raise _not_finite(loss, heads, self.inputs)
        return loss

    def per_head(self, outputs: Sequence[object], target: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The loss of every head, L_h of equation 3, for logging and for alternating updates.

        Args:
            outputs: as for `forward`.
            target: as for `forward`.
            *args: as for `forward`.
            **kwargs: as for `forward`.

        Returns:
            One scalar per head.

        Raises:
            ObjectiveError: as for `forward`, except that the losses need not be finite.
        """
        return self.losses(self.heads(outputs), target, *args, **kwargs)

    @abstractmethod
    def losses(self, heads: list[Tensor], target: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The loss of every head, computed from the logits of all; the one method that a subclass implements."""

    def total(self, heads: list[Tensor], target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sum over heads (equation 4)."""
        return total(self.losses(heads, target, *args, **kwargs))

    def heads(self, outputs: Sequence[object]) -> list[Tensor]:
        """The logits of all heads, in float32 or wider."""
        heads = logits_of_heads(outputs, self.logits)
        self.task.require_logits(heads[0])
        return heads

    def hard_losses(self, heads: Sequence[Tensor], target: Tensor) -> list[Tensor]:
        """J_hard of every head."""
        target = self.task.target(target, heads[0])
        losses = [self.hard(z, target) for z in heads]
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                raise ObjectiveError(
                    f"The hard loss returned {described(loss)}, not a scalar.",
                    hint=f'Reduce it over batch and positions, as reduction="{self.reduction}" does.',
                )
        return losses

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        options = {**vars(self), "task": self.task.name}
        shown = (name for name in options if name != "training" and not name.startswith("_"))
        return ", ".join(f"{name}={options[name]!r}" for name in shown)


def as_teachers(heads: list[Tensor], detach: bool) -> list[Tensor]:
    """The logits as other heads learn from them: constants, or not."""
    return [z.detach() for z in heads] if detach else heads


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum, in order."""
    return sum(terms[1:], start=terms[0])


def require_number(
    name: str, value: object, allowed: Callable[[Any], bool], *, must_be: str, why: str, hint: str
) -> None:
    """Raise an `ObjectiveError` unless an option is a plain number in its range, which ``must_be`` names."""
    if type(value) is bool or not isinstance(value, Real):
        raise ObjectiveError(
            f"{name} must be a number, not {value!r}.",
            hint="It is a constant of the objective and can't be learnt; of a tensor, pass tensor.item().",
        )
    if not allowed(value):
        raise ObjectiveError(f"{name} must be {must_be}, not {value}.", why=why, hint=hint)


def require_temperature(temperature: float) -> None:
    """Raise an `ObjectiveError` unless the temperature is finite and above 0."""
    require_number(
        "temperature",
        temperature,
        lambda value: 0 < value < math.inf,
        must_be="finite and above 0",
        why="The logits are divided by it (equation 2).",
        hint="The paper uses 2; 1 is the plain softmax.",
    )


def require_weight(weight: float) -> None:
    """Raise an `ObjectiveError` unless the weight is finite and at least 0."""
    require_number(
        "weight",
        weight,
        lambda value: 0 <= value < math.inf,
        must_be="finite and at least 0",
        why="It weighs the divergence between heads against the loss on the labels.",
        hint="1 is the usual choice.",
    )


def _not_finite(loss: Tensor, heads: Sequence[Tensor], inputs: str) -> ObjectiveError:
    what = f"The loss is {loss.item()}."
    if not heads[0].numel():
        return ObjectiveError(
            what, why="The batch is empty.", hint="Drop incomplete batches: DataLoader(drop_last=True)."
        )
    for head, z in enumerate(heads):
        samples = int((~torch.isfinite(z.detach())).reshape(len(z), -1).any(1).sum())
        if samples:
            return ObjectiveError(
                what,
                where=f"head {head}",
                why=f"Its logits are NaN or infinite in {samples} of {len(z)} samples.",
                hint="Look for a learning rate too high or an input that isn't finite; gradient clipping may help. "
                "Mask classes by a large negative number, not by infinity. Under a gradient scaler, which skips "
                "such steps, set finite=False.",
            )
    return ObjectiveError(
        what,
        why=f"All heads' logits are finite, so it comes from {inputs}, the loss on the labels or a constant.",
        hint="Look for NaN there, for a batch in which every position is ignored, or for a temperature so high that "
        "its square overflows.",
    )
