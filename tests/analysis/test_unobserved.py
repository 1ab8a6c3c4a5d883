"""What can't be observed is taken to do everything: it is never split where the observed network is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import SplitError
from fxcollab.tracing.examples import guess_inputs

_TWICE = "in place into storage that crosses the split twice"


class Unguessable(nn.Module):
    """Two inputs of different shapes, for which no usual ones fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.inplace, self.again = nn.ReLU(inplace=True), nn.ReLU(inplace=True)


class TwoViews(Unguessable):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        h = self.first(x)
        y, z = h.view(-1, 4), h.view(4, -1)
        v = self.second(torch.relu(h)) * w[:, None]
        y.add_(v)
        return v + z.reshape(-1, 4)


class ViewAndItsBase(Unguessable):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        v = self.second(torch.relu(x)) * w[:, None]
        x[:, :2] += v[:, 2:]
        return v


class OneTensorUnderTwoNames(Unguessable):
    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        v = self.inplace(x)
        relu = self.again(x)
        v2 = self.second(relu.mul_(0.5)) * w[:, None]
        return v2, v > 0


@pytest.mark.parametrize(
    ("kind", "split"), [(TwoViews, "relu"), (ViewAndItsBase, "relu"), (OneTensorUnderTwoNames, "again")]
)
def test_an_aliasing_hazard_is_refused_also_where_no_inputs_are_known(kind: type[nn.Module], split: str) -> None:
    examples = torch.randn(6, 4), torch.randn(6)
    with pytest.raises(SplitError, match=_TWICE):
        fxcollab.transform(kind(), splits=[split], example_inputs=examples)
    with pytest.raises(SplitError, match=_TWICE):
        fxcollab.transform(kind(), splits=[split])


def test_a_graph_says_on_which_inputs_it_was_exported() -> None:
    model, example = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.LayerNorm([2, 3])), torch.randn(5, 6)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (example,), dynamic_shapes=({0: batch},)).module()
    [spec] = guess_inputs(exported).inputs
    assert spec.shape == (5, 6) and spec.dtype == "float32"
