"""Quantization-aware training: of a model that is transformed, and of what `prune` returns."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn

import fxcollab
from tests.speeds import slow_but

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Quantizable(nn.Module):
    def __init__(self, *, prepared: bool) -> None:
        super().__init__()
        self.quantize, self.dequantize = quantization.QuantStub(), quantization.DeQuantStub()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())
        self.fc = nn.Linear(6, 5)
        if prepared:
            prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(self.quantize(x)))
        return self.dequantize(self.fc(h.mean((2, 3))))


def prepare(model: nn.Module) -> nn.Module:
    """Fuse layers and put in observers, in place."""
    quantization.fuse_modules_qat(model.train(), [["first.0", "first.1", "first.2"], ["second.0", "second.1"]], True)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(model, inplace=True)


def converted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = quantization.convert(copy.deepcopy(model).eval())
    assert "quantized" in type(found.fc).__module__
    return found


def trained(model: nn.Module) -> fxcollab.CollabGraphModule:
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0, example_inputs=(X,))
    optimizer = torch.optim.SGD(train_model.parameters(), 0.1)
    for _ in range(2):
        fxcollab.CollaborativeLoss()(train_model(X), torch.arange(4)).backward()
        optimizer.step()
    return train_model


@pytest.mark.parametrize("head", slow_but([1], [0, 1]))
def test_a_prepared_model_is_transformed_and_each_head_converted(head: int) -> None:
    train_model = trained(Quantizable(prepared=True))
    pruned = fxcollab.prune(train_model, head)
    fresh = fxcollab.prune(train_model, head, into=Quantizable(prepared=True))  # its observers saw nothing yet
    expected = converted(pruned)(X)
    assert torch.equal(converted(fresh)(X), expected)
    assert torch.allclose(expected, pruned.eval()(X), atol=0.1)


def test_what_is_pruned_is_prepared_trained_on_and_converted() -> None:
    train_model = trained(Quantizable(prepared=False))
    pruned = prepare(fxcollab.prune(train_model, 1))
    pruned(X).sum().backward()
    assert torch.allclose(converted(pruned)(X), pruned.eval()(X), atol=0.1)
    assert type(train_model.fc) is nn.Linear


@pytest.mark.slow
def test_a_model_that_takes_no_other_shapes_is_left_as_it_was() -> None:
    train_model, other = trained(Quantizable(prepared=True)), Quantizable(prepared=True)
    other.fc = nn.Linear(6, 7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(fxcollab.StateError, match="nothing was written"):
        fxcollab.prune(train_model, into=other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.slow
def test_a_prepared_model_is_proved() -> None:
    model = Quantizable(prepared=True)
    train_model = fxcollab.transform(model, "simple", ["first"], seed=0, example_inputs=(X,))
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
