"""Which operations draw random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxcollab._torch import OpOverload

_FUNCTIONS = frozenset(
    (
        "alpha_dropout", "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d", "drop_path",
        "feature_alpha_dropout", "feature_dropout", "gumbel_softmax", "multinomial", "normal", "poisson",
        "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "rrelu",
        "stochastic_depth",
    )
)  # fmt: skip
_METHODS = frozenset(
    (
        "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial",
        "normal_", "random_", "uniform_",
    )
)  # fmt: skip
_RATES = ("p", "drop_prob", "dropout", "drop_rate", "dropout_p", "attention_dropout")


def draws_randomly(node: fx.Node) -> bool:
    """Whether ``node`` is a random function or method; see `module_draws_randomly` for modules."""
    if node.op == "call_method":
        return str(node.target) in _METHODS
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    name = getattr(node.target, "__name__", "")
    if name in _FUNCTIONS:
        return bool(_rate_of_call(node) != 0)
    return name == "scaled_dot_product_attention" and bool(node.kwargs.get("dropout_p", 0.0) != 0.0)


def module_draws_randomly(module: nn.Module) -> bool:
    """Whether a call of ``module`` in train mode draws random numbers.

    Known are those of torch, and others whose class is named after dropout, stochastic depth or noise and whose rate
    isn't zero.
    """
    return any(_draws(part) for part in module.modules())


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.RReLU):
        return True
    name = type(module).__name__.lower()
    named = any(word in name for word in ("dropout", "droppath", "stochasticdepth", "noise"))
    recurrent = isinstance(module, nn.RNNBase | nn.MultiheadAttention | nn.Transformer)
    if named and not any(hasattr(module, rate) for rate in _RATES):
        return True
    return (named or recurrent) and any(_positive(getattr(module, rate, 0)) for rate in _RATES)


def _positive(rate: Any) -> bool:
    return isinstance(rate, int | float) and rate > 0


def _rate_of_call(node: fx.Node) -> Any:
    return node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None)
