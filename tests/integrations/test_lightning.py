"""Lightning's module: what it logs of the head that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxcollab

pytestmark = pytest.mark.slow


def logged(batch: Any, loss: fxcollab.Objective, model: nn.Module) -> dict[str, float]:
    lightning = pytest.importorskip("fxcollab.integrations.lightning")
    torch.manual_seed(0)
    train_model = fxcollab.transform(model, "simple", ["0"], seed=0)
    module = lightning.CollaborativeModule(train_model, loss, lambda parameters: torch.optim.SGD(parameters, 0.1))
    found: dict[str, float] = {}
    module.log_dict = lambda values, **options: found.update({name: float(value) for name, value in values.items()})
    module.eval()
    module.validation_step(batch, 0)
    return found


def test_ignored_labels_count_in_no_figure() -> None:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    half = y.clone()
    half[::2] = -100
    found = logged((x, half), fxcollab.CollaborativeLoss(), model)
    assert found == pytest.approx(logged((x[1::2], y[1::2]), fxcollab.CollaborativeLoss(), model))
    assert found["val_error"] == pytest.approx((model(x[1::2]).argmax(1) != y[1::2]).float().mean().item())


def test_a_regression_has_no_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    loss = fxcollab.CollaborativeLoss(hard=nn.MSELoss())
    assert logged((torch.randn(8, 4), torch.randn(8, 3)), loss, model).keys() == {"val_loss"}
