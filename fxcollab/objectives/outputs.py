"""Reading the logits out of what a training model returns."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcollab._torch import is_traced, is_transformed
from fxcollab.errors import ObjectiveError, closest

Field: TypeAlias = str | int | tuple[str | int, ...]
"""Where an output has its logits: a field's name or place; or the fields of hidden states, weight and bias."""


def logits_of_heads(outputs: Sequence[object], field: Field, of: str = "head") -> list[Tensor]:
    """The logits of every head, all of one shape.

    Args:
        outputs: one entry per head: a tensor, or a structure with a field of that name (a mapping, named tuple,
            dataclass or any other object).
        field: the field that holds the logits; a number for an entry of a tuple or list; or the fields of the last
            hidden states and of the output layer's weight and bias, of which the logits are computed here.
        of: what gives each output, for errors.

    Raises:
        ObjectiveError: there is no sequence of heads, a head has no floating-point logits, or shapes differ.
    """
    if isinstance(field, tuple):
        parts = [logits_of_heads(outputs, each, of) for each in field]
        return [F.linear(*layer) for layer in zip(*parts, strict=True)]
    one_output = hasattr(outputs, "_fields")
    if not isinstance(outputs, tuple | list) or not outputs or one_output:
        raise ObjectiveError(
            f"The loss takes a tuple or list with one output per {of}, not {described(outputs)}.",
            why="A named tuple is the output of one network." if one_output else None,
            hint="In eval mode a training model returns one output: call train_model.train() to train it, or pass "
            "fxcollab.all_heads(train_model)(x) to validate; the output of a single network as (output,).",
        )
    logits = [_logits_of(output, field, f"{of} {index}") for index, output in enumerate(outputs)]
    require_one_shape(logits, of)
    return logits


def warn_of_shared(logits: Sequence[Tensor]) -> None:
    """Warn where two heads give one tensor: neither learns from the other."""
    if len({id(z) for z in logits}) < len(logits) and not torch.compiler.is_compiling():
        warnings.warn(
            "heads give the same logits, one tensor that is computed before the split or beside it, and so learn "
            "nothing from each other: name the field of an output behind the split, as in "
            "CollaborativeLoss(logits=...), or split further in front",
            stacklevel=2,
        )


def widened(heads: Sequence[Tensor]) -> list[Tensor]:
    """Logits in one type, float32 or wider."""
    widest = reduce(torch.promote_types, (z.dtype for z in heads), torch.float32)
    return [z.to(widest) for z in heads]


def require_one_shape(logits: Sequence[Tensor], of: str = "head") -> None:
    """Raise an `ObjectiveError` where shapes differ: logits must not broadcast."""
    first = logits[0]
    for head, z in enumerate(logits):
        if z.shape != first.shape:
            raise ObjectiveError(
                f"All {of}s must give logits of one shape, not {tuple(first.shape)} and {tuple(z.shape)}.",
                where=f"{of}s 0 and {head}",
                hint="Heads are instances of one network: give them the same input and the same classes.",
            )


def described(value: object) -> str:
    """What a value is, for an error: its type, and for a tensor its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple | list) and not value:
        return f"an empty {type(value).__name__}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def is_concrete(tensor: Tensor) -> bool:
    """Whether Python may read the tensor's values: it has some, and the code isn't being recorded."""
    if torch.compiler.is_compiling() or is_traced() or is_transformed():
        return False
    if type(tensor) is not Tensor or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def at_least_float32(z: Tensor) -> Tensor:
    """``z`` itself, or in float32 where it has fewer bits."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _logits_of(output: object, field: str | int, where: str) -> Tensor:
    if isinstance(output, Tensor):
        z: object = output
    else:
        z = _entry(output, field)
    if not isinstance(z, Tensor):
        raise _no_logits(output, z, field, where)
    if not z.is_floating_point():
        raise ObjectiveError(
            f"Logits must be floating-point tensors, not {described(z)}.",
            where=where,
            hint="Pass the network's scores, not the classes with the highest ones.",
        )
    return z


def _entry(output: object, field: str | int) -> object:
    if isinstance(output, Mapping):
        return output.get(field)
    if isinstance(field, str):
        return getattr(output, field, None)
    return output[field] if isinstance(output, tuple | list) and -len(output) <= field < len(output) else None


def _no_logits(output: object, found: object, field: str | int, where: str) -> ObjectiveError:
    if isinstance(output, Mapping):
        fields = [str(key) for key in output]
    elif isinstance(output, tuple):
        fields = list(getattr(output, "_fields", ()))
    elif dataclasses.is_dataclass(output):
        fields = [entry.name for entry in dataclasses.fields(output)]
    else:
        fields = list(getattr(output, "__dict__", ()))
    kind, others = type(output).__name__, [name for name in fields if name != field]
    if field in fields:
        why = f"{field!r} of this {kind} is {described(found)}."
    else:
        why = f"This {kind} has {'the fields ' + ', '.join(others) if others else 'no named fields'}."
    hint = "Give their place in a tuple, as in CollaborativeLoss(logits=0), or select them yourself."
    if others:
        guess = closest(str(field), others, count=1) or others[0]
        hint = f"Name the field that holds them, as in CollaborativeLoss(logits={guess!r})."
    return ObjectiveError(f"The output has no logits under {field!r}.", where=where, why=why, hint=hint)
