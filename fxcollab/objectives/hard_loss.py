"""The loss on the labels: any callable; of torch's own it is known what they compare, ignore and weigh."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fxcollab.errors import ObjectiveError

HardLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A loss on the labels: (logits, target) to a scalar."""

IGNORED = -100
"""The label that cross entropy leaves out by default."""

V = TypeVar("V")

_INSTEAD: dict[Any, str] = {
    nn.BCELoss: "nn.BCEWithLogitsLoss()",
    F.binary_cross_entropy: "nn.BCEWithLogitsLoss()",
    nn.NLLLoss: "nn.CrossEntropyLoss()",
    F.nll_loss: "nn.CrossEntropyLoss()",
    nn.KLDivLoss: "nn.CrossEntropyLoss(), which takes soft labels,",
    F.kl_div: "nn.CrossEntropyLoss(), which takes soft labels,",
}


def require_loss(hard: HardLoss, reduction: str) -> None:
    """Raise an `ObjectiveError` unless it is a callable that takes logits and reduces as the soft loss does."""
    if isinstance(hard, type) or not callable(hard):
        raise ObjectiveError(
            f"hard must be a callable (logits, target) to a scalar, not {hard!r}.",
            hint="Pass an instance or a function, as in hard=nn.CrossEntropyLoss(label_smoothing=0.1).",
        )
    instead = found(_INSTEAD, hard)
    if instead is not None:
        raise ObjectiveError(
            f"hard must take logits, not what {getattr(hard, '__name__', type(hard).__name__)} takes.",
            why="Heads learn from each other's logits, which must not be probabilities yet.",
            hint=f"Leave the last softmax, log-softmax or sigmoid out of the model, and use {instead}.",
        )
    own = getattr(hard, "reduction", None)
    if own is None:
        with suppress(TypeError, ValueError):
            parameter = inspect.signature(hard).parameters.get("reduction")
            own = parameter and parameter.default
    if own in ("mean", "sum", "none") and own != reduction:
        raise ObjectiveError(
            f"The hard loss has reduction {own!r}, the soft one {reduction!r}.",
            why="The two can't be balanced when only one of them grows with the batch.",
            hint=f"Give the hard loss reduction={reduction!r}.",
        )


def found(table: Mapping[Any, V], hard: HardLoss | None) -> V | None:
    """The entry of a loss of torch's, or of a subclass, a partial or a compiled version of one."""
    inner = unwrapped(hard)
    kinds = type(inner).__mro__ if isinstance(inner, nn.Module) else (inner,)
    return next((table[kind] for kind in kinds if kind in table), None)


def unwrapped(hard: object) -> object:
    """The loss inside ``functools.partial`` and ``torch.compile``."""
    while True:
        inner = hard.func if isinstance(hard, partial) else getattr(hard, "_orig_mod", None)
        if inner is None:
            return hard
        hard = inner


def is_plain_cross_entropy(hard: HardLoss) -> bool:
    """Whether it is ``nn.CrossEntropyLoss`` with no option but the reduction."""
    if type(hard) is not nn.CrossEntropyLoss or hard._forward_hooks or hard._forward_pre_hooks:
        return False
    return hard.weight is None and hard.label_smoothing == 0 and hard.ignore_index == IGNORED


def ignored_label(hard: HardLoss) -> int:
    """The label that a loss of classes leaves out."""
    return int(option_of(hard, "ignore_index", IGNORED))


def unreduced(hard: HardLoss) -> HardLoss:
    """A loss of torch's that isn't reduced."""
    loss: Any = hard
    if not isinstance(hard, nn.Module):
        return partial(loss, reduction="none")
    loss = copy.copy(unwrapped(hard))
    loss.reduction = "none"
    return cast(HardLoss, loss)


def option_of(hard: HardLoss, name: str, default: Any) -> Any:
    """An option of a loss: a bound argument, or else an attribute."""
    inner: object = hard
    while isinstance(inner, partial):
        if name in inner.keywords:
            return inner.keywords[name]
        inner = inner.func
    return getattr(unwrapped(inner), name, default)
