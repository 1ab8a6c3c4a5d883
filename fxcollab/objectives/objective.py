"""What all objectives over a head tree share: reading heads, the loss on the labels, the sum, the checks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import TypedDict

import torch
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.outputs import described, is_concrete, logits_of_heads
from fxcollab.objectives.tasks import HardLoss, Task, task_of


class Options(TypedDict, total=False):
    """What every `Objective` takes."""

    task: str | None
    hard: HardLoss | None
    logits: str
    reduction: str
    finite: bool


class Objective(nn.Module, ABC):
    """A loss that is a sum over heads (equation 4): each head's own part is `per_head`.

    Args:
        task: what outputs mean: "classification" (softmax), "multi-label" (sigmoid) or "regression". By default it
            goes by ``hard``: ``nn.BCEWithLogitsLoss()`` is multi-label, ``nn.MSELoss()`` and its like regression, all
            others classification.
        hard: the loss on the labels, any callable (logits, target) to a scalar. The default is the task's usual one:
            cross entropy, binary cross entropy with logits, squared error.
        logits: name of the field that holds the logits, where a head's output is a structure: "logits" for
            transformers, "out" for torchvision's segmentation models.
        reduction: "mean" or "sum" over batch and positions. ``hard`` must reduce in the same way.
        finite: whether a loss that is not finite is refused, and the head named. It waits for the device; where the
            loss is compiled, captured or transformed by functorch nothing is checked. Turn it off under a gradient
            scaler, which skips such steps.

    Raises:
        ObjectiveError: an option is out of its range, or ``hard`` is no loss or reduces otherwise.
    """

    shown: tuple[str, ...] = ("logits", "reduction")
    """Attributes that ``print(loss)`` shows."""

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

    def forward(self, outputs: Sequence[object], target: Tensor) -> Tensor:
        """The total loss of all heads (equation 4).

        Args:
            outputs: what a training model returns: a tuple or list with one entry per head, each a tensor of
                logits or a structure (mapping, named tuple, dataclass, any object) with a field of them.
                Logits are (N, C), or (N, C, d1, ...) for dense predictions, of one shape for all heads; of a
                multi-label task or a regression any shape with the batch first.
            target: class indices, (N) or (N, d1, ...), int64 or uint8; or soft labels, floating, shaped like
                the logits, as for the other tasks. With a ``hard`` of your own: whatever that takes.

        Returns:
            A scalar.

        Raises:
            ObjectiveError: outputs or target don't have these forms, there are too few heads, ``hard`` doesn't
                return a scalar, or the loss isn't finite.
        """
        heads = self.heads(outputs)
        return self.checked(self.total(heads, target), heads)

    def per_head(self, outputs: Sequence[object], target: Tensor) -> list[Tensor]:
        """The loss of every head, L_h of equation 3, for logging and for alternating updates.

        Args:
            outputs: as for `forward`.
            target: as for `forward`.

        Returns:
            One scalar a head.

        Raises:
            ObjectiveError: as `forward`, but for the check that all is finite.
        """
        return self.losses(self.heads(outputs), target)

    @abstractmethod
    def losses(self, heads: list[Tensor], target: Tensor) -> list[Tensor]:
        """The loss of every head by the logits of all; what an objective has to say."""

    def total(self, heads: list[Tensor], target: Tensor) -> Tensor:
        """The sum over heads (equation 4)."""
        return total(self.losses(heads, target))

    def heads(self, outputs: Sequence[object]) -> list[Tensor]:
        """The logits of all heads, in float32 or wider."""
        heads = logits_of_heads(outputs, self.logits)
        self.task.require_logits(heads[0])
        return heads

    def labelled(self, heads: Sequence[Tensor], target: Tensor) -> list[Tensor]:
        """J_hard of every head."""
        target = self.task.target(target, heads[0])
        return [self._hard(z, target) for z in heads]

    def checked(self, loss: Tensor, heads: Sequence[Tensor], others: str = "the target") -> Tensor:
        """The loss itself, where it is finite, or nobody may ask; ``others`` is what else it was made of."""
        if not self.finite or not is_concrete(loss) or bool(torch.isfinite(loss)):
            return loss
        raise _not_finite(loss, heads, others)

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        options = [f"{name}={getattr(self, name)!r}" for name in self.shown]
        options += [f"task={self.task.name!r}"]
        # A module is printed as a child.
        return ", ".join(options if isinstance(self.hard, nn.Module) else [*options, f"hard={self.hard!r}"])

    def _hard(self, z: Tensor, target: Tensor) -> Tensor:
        loss = self.hard(z, target)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ObjectiveError(
                f"The hard loss returned {described(loss)}, not a scalar.",
                hint=f'Reduce it over batch and positions, as reduction="{self.reduction}" does.',
            )
        return loss


def learnt_from(heads: list[Tensor], detach: bool) -> list[Tensor]:
    """The logits of all heads as others learn from them: as constants, or not."""
    return [z.detach() for z in heads] if detach else heads


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum, in order."""
    return sum(terms[1:], start=terms[0])


def require_number(value: object, name: str) -> None:
    """Refuse what is no plain number.

    Raises:
        ObjectiveError: it is a text, a tensor or the like.
    """
    if type(value) is bool or not isinstance(value, Real):
        raise ObjectiveError(
            f"{name} must be a number, not {value!r}.",
            hint="It is a constant of the objective; of a tensor, take tensor.item(). It can't be learnt.",
        )


def require_temperature(temperature: float) -> None:
    """Refuse what logits can't be divided by.

    Raises:
        ObjectiveError: it isn't finite and above 0.
    """
    require_number(temperature, "The temperature")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ObjectiveError(
            f"The temperature must be finite and above 0, not {temperature}.",
            why="The logits are divided by it (equation 2).",
            hint="The paper uses 2; 1 is the plain softmax.",
        )


def require_weight(weight: float, name: str) -> None:
    """Refuse a weight of a soft term that would turn it round.

    Raises:
        ObjectiveError: it isn't finite and at least 0.
    """
    require_number(weight, name)
    if not (weight >= 0 and math.isfinite(weight)):
        raise ObjectiveError(
            f"{name} must be finite and at least 0, not {weight}.",
            why="It weighs what heads learn from each other against the labels.",
            hint="1 is the usual choice.",
        )


def _not_finite(loss: Tensor, heads: Sequence[Tensor], others: str) -> ObjectiveError:
    what = f"The loss is {loss.item()}."
    if not heads[0].numel():
        return ObjectiveError(what, why="The batch is empty.", hint="Leave the rest out: DataLoader(drop_last=True).")
    for head, z in enumerate(heads):
        bad = ~torch.isfinite(z.detach())
        if bad.any():
            samples = int(bad.flatten(1).any(1).sum()) if z.dim() > 1 else int(bad.sum())
            return ObjectiveError(
                what,
                where=f"head {head}",
                why=f"Its logits hold NaN or infinity in {samples} of {len(z)} samples.",
                hint="Look for a learning rate too high or an input that isn't finite; gradient clipping may help. "
                "Mask classes by a large negative number, not by infinity. Under a gradient scaler, which skips "
                "such steps, say finite=False.",
            )
    return ObjectiveError(
        what,
        why=f"All heads' logits are finite, so it comes from {others}, the loss on the labels or a constant.",
        hint="Look for NaN there, for a batch in which every position is ignored, or for a temperature so high that "
        "its square overflows.",
    )
