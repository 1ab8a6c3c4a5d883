"""Where an opened forward can't be captured, the refusal says where to split instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CaptureError

X = torch.rand(2, 4)


class Asks(nn.Module):
    """Needs the number itself: it can't be opened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.first(x) * float(x.sum()))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = nn.Linear(4, 4), nn.Sequential(Asks()), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self.stem(x)))


class AsksItself(Around):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * float(x.sum()))


def refusal(model: nn.Module, *splits: str) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        fxcollab.transform(model, "hierarchical", splits, example_inputs=(X,))
    return caught.value


def test_the_nearest_module_that_can_be_split_at_is_named() -> None:
    model = Around()
    error = refusal(model, "stem", "middle.0.inner.0")
    assert "nearest split to 'middle.0.inner.0' that works is 'middle.0'" in str(error.hint)
    assert "'stem'" not in str(error.hint)
    assert error.where and error.why
    fxcollab.transform(model, "hierarchical", ["stem", "middle.0"], example_inputs=(X,))


@pytest.mark.slow
def test_where_the_model_itself_resists_no_other_split_is_proposed() -> None:
    assert "the model's own forward can't be traced" in str(refusal(AsksItself(), "stem", "middle.0").hint)


@pytest.mark.slow
def test_a_module_around_that_has_nothing_behind_it_is_not_proposed() -> None:
    class Ends(Around):
        def forward(self, x: Tensor) -> Any:
            return self.middle(self.stem(x))

    assert "no module around 'middle.0.first' can be split at" in str(refusal(Ends(), "middle.0.first").hint)
