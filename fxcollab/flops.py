"""The floating point operations of operators: by torch's formulas, and of recurrent layers, for which it has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fxcollab._torch import OpOverload


def _recurrent(times: int, input_shape: Sequence[int], *others: Any, out_shape: Any, **_: Any) -> int:
    """Every step of a sequence is multiplied by all weight matrices, a multiplication and an addition an entry."""
    weights = others[0] if isinstance(others[0], list) else others[:2]  # of all layers, or of one
    entries = sum(math.prod(shape) for shape in weights if len(shape) == 2)  # biases are vectors
    return times * 2 * math.prod(input_shape[:-1]) * entries


# Of oneDNN, cuDNN and MIOpen: elsewhere such layers are made of operators that torch counts.
_LAYERS = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
_RECURRENT = {
    getattr(torch.ops.aten, f"{layer}{suffix}"): partial(_recurrent, times)
    for layer in _LAYERS
    for suffix, times in (("", 1), ("_backward", 2))  # with respect to the input, and to the weights
}


def counting() -> FlopCounterMode:
    """A mode that counts what runs in it, by module."""
    return FlopCounterMode(display=False, custom_mapping=_RECURRENT)


_FORMULAS: Mapping[Any, Callable[..., Any]] = counting().flop_registry


def flops_of(function: OpOverload, args: Any, kwargs: Any, result: Any) -> int:
    """The floating point operations of a call of an operator; 0 for one that has no formula."""
    count = _FORMULAS.get(function.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0
