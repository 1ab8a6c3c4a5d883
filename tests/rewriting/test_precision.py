"""Complex and lower-precision values, and autograd functions of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.rewriting.hazard_helpers import Stem, X, proven
from tests.speeds import slow_but


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.fft(self.stem(x))
        return self.head(torch.fft.ifft(spectrum * self.weight).real), spectrum * self.weight


@pytest.mark.parametrize("splits", slow_but([["stem"]], [["stem"], ["fft_fft"]]))
def test_complex_values_cross(splits: list[str]) -> None:
    proven(Complex(), splits)


class Halves(nn.Module):
    """Computes in a lower precision between its layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stem, self.head, self.dtype = nn.Linear(4, 4), nn.Linear(4, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        low = (y * 2).to(self.dtype)
        return self.head((low * low).to(y.dtype) + y)


@pytest.mark.parametrize(
    "dtype", slow_but([torch.float16, torch.bfloat16], [torch.float16, torch.bfloat16, torch.float32])
)
@pytest.mark.parametrize("splits", slow_but([["to"]], [["stem"], ["to"]]))
def test_lower_precision_inside(dtype: torch.dtype, splits: list[str]) -> None:
    proven(Halves(dtype), splits)


@pytest.mark.parametrize(
    "dtype", slow_but([torch.float16, torch.float64], [torch.float16, torch.bfloat16, torch.float64])
)
def test_models_of_other_precisions(dtype: torch.dtype) -> None:
    proven(Stem(nn.LayerNorm(4)).to(dtype), ["stem"], (X.to(dtype),))


def test_a_model_that_insists_on_its_own_precision() -> None:
    class Insists(Stem):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.behind(self.stem(x)).float())

    proven(Insists(nn.LayerNorm(4)), ["stem"])


class Steep(torch.autograd.Function):
    """Its backward isn't that of its forward, so that tracing through it would show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5


class Uses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Steep.apply(x)


class UsesInForward(Stem):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Steep.apply(self.behind(Steep.apply(self.stem(x)))))


@pytest.mark.parametrize(
    "model",
    [pytest.param(lambda: Stem(Uses()), marks=pytest.mark.slow), lambda: UsesInForward(nn.Linear(4, 4))],
    ids=["kept whole", "opened"],
)
def test_custom_functions_keep_their_backward(model: Callable[[], nn.Module]) -> None:
    proven(model(), ["stem"])
    proven(model(), [], pattern="multi-instance")
