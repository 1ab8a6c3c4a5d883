"""Factors, types, and the ways in which a function is run or traced."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fxcollab import rescale

FACTORS = [1 / 2, 1 / 3, 1 / 5, 1 / 7]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
REAL_DTYPES = [dtype for dtype in DTYPES if not dtype.is_complex]

Function = Callable[[Tensor], Tensor]


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor, to tell -0.0 from 0.0."""
    return value.detach().contiguous().flatten().view(torch.uint8)


def finite_values(dtype: torch.dtype) -> Tensor:
    """The extremes of a type, both zeros, denormals, and many random bit patterns."""
    if dtype.is_complex:
        real = finite_values(torch.float32 if dtype == torch.complex64 else torch.float64)
        return torch.complex(real, real.flip(0)).to(dtype)
    info = torch.finfo(dtype)
    named = [0.0, 1.0, 1 / 3, math.pi, info.max, info.tiny, info.eps, info.smallest_normal]
    extremes = torch.tensor([*named, *(-v for v in named)], dtype=torch.float64).to(dtype)
    signed = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    least = torch.ones(1, dtype=signed).view(dtype)  # the least denormal
    generator = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(signed).min, torch.iinfo(signed).max
    patterns = torch.randint(low, high, (500,), generator=generator, dtype=signed).view(dtype)
    values = torch.cat([extremes, least, -least, patterns])
    return values[values.isfinite()]


def rescaled_by(factor: float) -> Function:
    return lambda x: rescale(x, factor)


def exported(function: Function, example: Tensor, strict: bool) -> Function:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return torch.export.export(Calls(), (example,), strict=strict).module()


RUNNERS: dict[str, Callable[[Function, Tensor], Function]] = {
    "eager": lambda function, _: function,
    "compile": lambda function, _: torch.compile(function, fullgraph=True, backend="aot_eager"),
    "export": lambda function, x: exported(function, x, strict=False),
    "export strict": lambda function, x: exported(function, x, strict=True),
    "jit.trace": lambda function, x: torch.jit.trace(function, (x,)),
    "symbolic_trace": lambda function, _: fx.symbolic_trace(function),
    "vmap": lambda function, _: vmap(function),
    "make_fx": lambda function, x: make_fx(function)(x),
    "make_fx before autograd": lambda function, x: make_fx(function, pre_dispatch=True)(x),
    "checkpoint": lambda function, _: lambda x: checkpoint(function, x, use_reentrant=False),
}
# make_fx sees what autograd has left over, where every detach is gone too: only gradients taken inside hold.
DIFFERENTIABLE = [name for name in RUNNERS if name != "make_fx"]
