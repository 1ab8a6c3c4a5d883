"""The rescale: identity forward, gradient times a factor backward (paper, equation 5).

Three ways of writing it fail silently somewhere: a plain ``autograd.Function`` loses its backward under
``torch.export`` and is inlined by a second ``symbolic_trace``; a tensor hook is lost by both; and
``x*s + (x*(1-s)).detach()`` is not the identity for 3, 5 or 7 heads. So this one is a function that

* passes proxies to ``__torch_function__``, and therefore stays one node whenever a graph is traced again;
* is an ``autograd.Function`` that copies nothing where autograd runs (eager, ``torch.compile``, vmap);
* consists of operators for ``torch.export``, ``torch.jit.trace`` and ``make_fx``, which record nothing else, for vmap
  and grad under ``torch.compile``, which would drop the backward, and for forward-mode derivatives, which follow
  views.

It doesn't depend on whether a value requires a gradient: that isn't known under vmap, and what is exported or traced
may be trained later on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fxcollab._torch import computes_forward_derivatives, is_traced, is_transformed
from fxcollab.runtime.tensors import CARRIES_NO_GRADIENT, map_tensors


class _Rescale(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: float) -> Tensor:
        return value.view_as(value) if value.layout is torch.strided else value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def rescale(value: Any, factor: float) -> Any:
    """``value`` itself, bit for bit; the gradient that comes back through it is multiplied by ``factor``.

    Args:
        value: a tensor of any shape, any pytree of tensors, or an object that holds tensors, of which a copy is
            returned. Integers, booleans and other values without a gradient are returned unchanged.
        factor: the gradient's factor, 1/H at a split with H branches (equation 5).

    Returns:
        The same value. A tensor may share the storage of ``value``; don't write into it.

    Raises:
        TypeError: ``value`` contains an object that holds modules, or that holds tensors and can't be copied.
    """
    if has_torch_function_unary(value):
        return handle_torch_function(rescale, (value,), value, factor)
    if isinstance(value, Tensor):
        return _rescale_tensor(value, factor)
    if isinstance(value, CARRIES_NO_GRADIENT):
        return value
    return map_tensors(lambda leaf: rescale(leaf, factor), value)


# Generated code and re-traced graphs refer to it by this, its public name: ``fxcollab_rescale(x, 0.5)``.
rescale.__module__ = "fxcollab"


def _rescale_tensor(value: Tensor, factor: float) -> Tensor:
    if not (value.is_floating_point() or value.is_complex()):
        return value
    if value.layout is not torch.strided and not value.requires_grad:
        return value  # sparse tensors have no views
    if _needs_operators():
        return _in_operators(value, factor)
    result: Tensor = _Rescale.apply(value, factor)
    return result


def _needs_operators() -> bool:
    """Whether an ``autograd.Function`` would be dropped or refused here."""
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_dynamo_compiling():  # it drops the backward under vmap, also of grad inside
        return is_transformed()
    return is_traced() or computes_forward_derivatives()


def _in_operators(value: Tensor, factor: float) -> Tensor:
    """``value - 0 * factor``, where the zero's gradient is -1: exact for signed zeros, infinities and all between.

    The zero is the difference of two finite numbers, since that of infinities is not a number; so at infinities and
    NaN the gradient is 0 here.
    """
    if value.is_complex():
        return torch.complex(_in_operators(value.real, factor), _in_operators(value.imag, factor))
    finite = value.nan_to_num()
    return value.detach() - (finite.detach() - finite) * factor
