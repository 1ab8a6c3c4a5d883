"""The base of all objectives over the heads: reading logits, the loss on the labels, the sum, the checks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError
from fxcollab.objectives.hard_loss import HardLoss, ignored_label
from fxcollab.objectives.options import Number
from fxcollab.objectives.outputs import Field, described, is_concrete, logits_of_heads, warn_of_shared, widened
from fxcollab.objectives.tasks import Task, task_of
from fxcollab.objectives.tokens import Tokens, flat_labels, flat_logits

Mask: TypeAlias = Callable[[Tensor], Tensor]
"""Of a target, where the consensus counts: booleans, one for every sample or position."""


class Options(TypedDict, total=False):
    """The options of every `Objective`."""

    task: str | None
    hard: HardLoss | None
    logits: Field
    tokens: Tokens | None
    consensus_on: str | Mask
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
            transformers, "out" for torchvision's segmentation models; 0 for the first of a tuple. Two or three
            fields, ``("hidden", "weight", "bias")``, are the last hidden states and the output layer: then
            `CollaborativeLoss` never has all logits of a head.
        tokens: for logits (N, T, V) of a language model with labels (N, T): "aligned" where those at t are scored by
            the label at t; "shifted" by the label at t + 1, as of a causal model. The default, None, is for classes
            in dimension 1.
        consensus_on: where heads learn from each other. "labelled" (default): where the loss on the labels counts,
            so not where a class index is the ``ignore_index`` of ``hard``, -100 by default; "all"; or a callable that
            takes the target, flat (N * T) for tokens, and returns booleans, one per sample or one per position.
        reduction: "mean" or "sum" over batch and positions, or "none" for one value per position; for a multi-label
            task or a regression per value. ``hard`` must reduce in the same way.
        finite: whether a loss that is not finite raises an error that names the head (default True). The check waits
            for the device, and is skipped where the loss is compiled, captured or transformed by ``torch.func``. Turn
            it off under a gradient scaler, which skips such steps.

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
        logits: Field = "logits",
        tokens: Tokens | None = None,
        consensus_on: str | Mask = "labelled",
        reduction: str = "mean",
        finite: bool = True,
    ) -> None:
        super().__init__()
        self.task: Task = task_of(task, hard, reduction)
        self.hard: HardLoss = self.task.hard
        _require_choice("tokens", tokens, (None, "aligned", "shifted"))
        if not callable(consensus_on):
            _require_choice("consensus_on", consensus_on, ("labelled", "all"), "or a callable of the target")
        if tokens and self.task.name != "classification":
            raise ObjectiveError(
                f"The option tokens is for classification, not for {self.task.name}.",
                why="A token is one of a vocabulary.",
                hint="Leave it out: every value of the output has a target of its own.",
            )
        self.logits = logits
        self.tokens = tokens
        self.consensus_on = consensus_on
        self.reduction = reduction
        self.finite = finite

    def __setattr__(self, name: str, value: Any) -> None:
        """As in ``nn.Module``, which would register a parameter where a number belongs."""
        if isinstance(getattr(type(self), name, None), Number | property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        outputs: Sequence[object],
        target: Tensor | None,
        *args: Any,
        num_items: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The total loss of all heads (equation 4).

        Args:
            outputs: what a training model returns: a tuple or list with one entry per head, each a tensor of
                logits or a structure (mapping, named tuple, dataclass, any object) with a field of them.
                Logits are (N, C), or (N, C, d1, ...) for dense predictions, of one shape for all heads; (N, T, V)
                with ``tokens``; for a multi-label task or a regression any shape with the batch first.
            target: class indices, (N) or (N, d1, ...), int64 or uint8; or soft labels, floating point, shaped like
                the logits, as for the other tasks. With a ``hard`` of your own: whatever that takes. None for a batch
                without labels: the hard term is 0, and the soft one counts everywhere.
            *args: further arguments: ``teachers`` of `DistillationLoss`, ``features`` of `ONELoss`.
            num_items: how many labelled samples or positions all batches hold whose gradients are accumulated; the
                mean is taken over them, so that the accumulated step is that of one large batch. Only where both
                terms count on the labelled alone, without class weights.
            **kwargs: further arguments by name.

        Returns:
            A scalar; with ``reduction="none"`` one value per position.

        Raises:
            ObjectiveError: outputs or target don't have these forms, there are too few heads, ``hard`` doesn't
                return a scalar, or the loss isn't finite.
        """
        heads, target, shape = self.read(outputs, target)
        loss = self.total(heads, target, *args, **kwargs)
        if num_items is not None:
            loss = loss * self._share(heads[0], target, num_items)
        if self.finite and is_concrete(loss):
            _require_finite(loss, heads, self.inputs)
        return self.shaped(loss, shape)

    def per_head(self, outputs: Sequence[object], target: Tensor | None, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The loss of every head, L_h of equation 3, for logging and for alternating updates.

        Args:
            outputs: as for `forward`.
            target: as for `forward`.
            *args: as for `forward`.
            **kwargs: as for `forward`.

        Returns:
            One scalar per head; with ``reduction="none"`` one value per position.

        Raises:
            ObjectiveError: as for `forward`, except that the losses need not be finite.
        """
        heads, target, shape = self.read(outputs, target)
        return [self.shaped(loss, shape) for loss in self._checked_losses(heads, target, *args, **kwargs)]

    @abstractmethod
    def losses(self, heads: list[Tensor], target: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The loss of every head, computed from the logits of all; the one method that a subclass implements.

        The logits are in float32 or wider.
        """

    def total(self, heads: list[Tensor], target: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The sum over heads (equation 4), of logits in their own types."""
        return total(self._checked_losses(heads, target, *args, **kwargs))

    def heads(self, outputs: Sequence[object], of: str = "head") -> list[Tensor]:
        """The logits of all heads, in float32 or wider, classes in dimension 1; ``of`` says whose, for errors."""
        return widened(self._flat(logits_of_heads(outputs, self.logits, of)))

    def read(self, outputs: Sequence[object], target: Any) -> tuple[list[Tensor], Any, tuple[int, ...] | None]:
        """The logits of all heads in their own types, the target that fits them, and the shape (N, T) of tokens."""
        raw = logits_of_heads(outputs, self.logits)
        warn_of_shared(raw)
        heads = self._flat(raw)
        if not self.tokens:
            return heads, target, None
        shape = tuple(raw[0].shape[:2])
        if target is not None:
            target = flat_labels(target, shape, self.tokens, ignored_label(self.hard))
        return heads, target, shape

    def shaped(self, loss: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """One value per token in the shape of the tokens; everything else as it is."""
        return loss.view(shape) if shape is not None and loss.dim() else loss

    def hard_losses(self, heads: Sequence[Tensor], target: Tensor | None) -> list[Tensor]:
        """J_hard of every head; 0 without labels, also where all of them are ignored."""
        if target is None:
            return [self.reduced([self.task.nothing(z)])[0] for z in heads]
        target = self.task.target(target, heads[0])
        losses = [self.hard(z, target) for z in heads]
        shape = self.task.positions(heads[0]) if self.reduction == "none" else ()
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.shape != shape:
                wanted = f"of shape {shape}" if shape else "a scalar"
                raise ObjectiveError(
                    f"The hard loss returned {described(loss)}, not {wanted}.",
                    hint=f'Reduce it over batch and positions as reduction="{self.reduction}" does.',
                )
        labelled = self.task.labelled(target, heads[0])
        if labelled is None or shape:
            return losses
        return [torch.where(labelled.any(), loss, 0) for loss in losses]  # the mean over no labels is NaN

    def counted(self, target: Tensor | None, z: Tensor) -> Tensor | None:
        """Where the soft term counts, by ``consensus_on``: a mask of all positions, or None for everywhere.

        Raises:
            ObjectiveError: the callable didn't return such a mask.
        """
        if target is None or self.consensus_on == "all":
            return None
        if not callable(self.consensus_on):
            return self.task.labelled(self.task.target(target, z), z)
        mask, shape = self.consensus_on(target), self.task.positions(z)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in (shape, shape[:1]):
            raise ObjectiveError(
                f"consensus_on returned {described(mask)}.",
                why=f"It must return booleans, of shape {shape[:1]} or {shape}.",
                hint="As in consensus_on=lambda target: target != padding.",
            )
        return mask.view(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)

    def reduced(self, terms: Sequence[Tensor], counted: Tensor | None = None) -> list[Tensor]:
        """Terms of all positions reduced by ``reduction`` over those that are counted."""
        if counted is not None:
            terms = [torch.where(counted, term, 0) for term in terms]
        if self.reduction == "none":
            return list(terms)
        if self.reduction == "mean" and counted is None:
            return [term.mean() for term in terms]
        count = 1 if self.reduction == "sum" or counted is None else counted.sum().clamp(min=1)
        return [term.sum() / count for term in terms]

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options_shown().items())

    def options_shown(self) -> dict[str, object]:
        """The options that ``print(loss)`` shows."""
        options = {**vars(self), "task": self.task.name}
        return {name: options[name] for name in options if name != "training" and not name.startswith("_")}

    def _checked_losses(self, heads: list[Tensor], target: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        """What `losses` returns: one for every head, each reduced by ``reduction``."""
        heads = widened(heads)
        losses = self.losses(heads, target, *args, **kwargs)
        shape = self.task.positions(heads[0]) if self.reduction == "none" else ()
        found = losses if isinstance(losses, list | tuple) else None
        wrong = [loss for loss in found or () if not isinstance(loss, Tensor) or loss.shape != shape]
        if found is None or len(found) != len(heads) or wrong:
            returned = (
                described(losses if found is None else wrong[0]) if found is None or wrong else f"{len(found)} losses"
            )
            raise ObjectiveError(
                f"losses returned {returned}.",
                where=f"{type(self).__qualname__}.losses",
                why=f"It returns a list of {len(heads)} losses, one for each head, each of shape {shape}.",
                hint="self.reduced(terms, self.counted(target, heads[0])) reduces terms of all positions as the "
                "options say.",
            )
        return list(losses)

    def _flat(self, heads: list[Tensor]) -> list[Tensor]:
        if self.tokens:
            heads = [flat_logits(z) for z in heads]
        self.task.require_logits(heads[0])
        return heads

    def _share(self, z: Tensor, target: Tensor | None, num_items: int | Tensor) -> float | Tensor:
        """Of all labelled positions, those in this batch."""
        if self.reduction != "mean":
            raise ObjectiveError(
                f"num_items is for the mean over batches, the reduction is {self.reduction!r}.",
                hint="Divide the loss by it yourself, or leave reduction='mean'.",
            )
        if target is None or self.consensus_on != "labelled" or self.task.has_class_weights:
            raise ObjectiveError(
                "num_items is for means over the labelled positions alone.",
                why="Heads also learn from each other where there is no label, or classes have weights, so that the "
                "two terms are means over other numbers.",
                hint="Leave it out where batches are equal, or take both terms with reduction='sum' from loss.parts "
                "and divide each by its own number.",
            )
        if not isinstance(num_items, Tensor) and num_items <= 0:
            raise ObjectiveError(f"num_items must be above 0, not {num_items}.", hint="It counts labelled positions.")
        labelled = self.task.labelled(self.task.target(target, z), z)
        return (math.prod(self.task.positions(z)) if labelled is None else labelled.sum()) / num_items


def as_teachers(heads: list[Tensor], detach: bool) -> list[Tensor]:
    """The logits as other heads learn from them: constants, or not."""
    return [z.detach() for z in heads] if detach else heads


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum, in order."""
    return sum(terms[1:], start=terms[0])


def _require_choice(name: str, value: object, choices: Sequence[object], others: str = "") -> None:
    if value not in choices:
        known = ", ".join(map(repr, choices)) + (f", {others}" if others else "")
        raise ObjectiveError(f"{name} must be one of {known}, not {value!r}.", hint=f"The default is {choices[0]!r}.")


def _require_finite(loss: Tensor, heads: Sequence[Tensor], inputs: str) -> None:
    if not heads[0].numel():
        raise ObjectiveError(
            "There is nothing to learn from.",
            why="The batch is empty.",
            hint="Drop incomplete batches: DataLoader(drop_last=True).",
        )
    if not bool(torch.isfinite(loss).all()):
        raise _not_finite(loss, heads, inputs)


def _not_finite(loss: Tensor, heads: Sequence[Tensor], inputs: str) -> ObjectiveError:
    bad = int((~torch.isfinite(loss)).sum())
    what = f"{bad} of {loss.numel()} losses are not finite." if loss.dim() else f"The loss is {loss.item()}."
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
