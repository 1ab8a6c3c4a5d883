"""Whether the values of a tensor can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fxcollab._torch import is_transformed


def is_concrete(tensor: Tensor) -> bool:
    """Whether the value can be looked at here: it is there, and nothing records the code that looks."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if get_proxy_mode() is not None:
        return False
    if type(tensor) is not Tensor or tensor.is_meta or is_transformed():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
