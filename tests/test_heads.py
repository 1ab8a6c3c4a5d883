"""The ensemble of all heads, and the evaluation of every head and of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from tests.references import SmallConvNet
from tests.rewriting.test_eval_output import Structured, X


def made(model: nn.Module) -> fxcollab.CollabGraphModule:
    return fxcollab.transform(model, splits=["layer1", "layer2"], seed=0)


def test_the_ensemble_returns_the_mean_and_shares_the_weights() -> None:
    train_model = made(SmallConvNet())
    ensemble = fxcollab.ensemble(train_model).eval()
    assert train_model.training and all(module.training for module in train_model.modules())
    expected = torch.stack(fxcollab.all_heads(train_model.eval())(X)).mean(0)
    assert torch.equal(ensemble(X), expected)
    own, others = train_model.state_dict(keep_vars=True), ensemble.state_dict(keep_vars=True)
    assert list(own) == list(others) and all(own[key] is others[key] for key in own)
    exported = torch.export.export(ensemble, (X,)).module()
    assert torch.allclose(exported(X), expected, atol=1e-6)


def test_the_ensemble_of_structures_has_the_mean_of_what_can_be_averaged() -> None:
    train_model = made(Structured()).eval()
    heads = fxcollab.all_heads(train_model)(X)
    found = fxcollab.ensemble(train_model)(X)
    assert torch.equal(found["logits"], torch.stack([head["logits"] for head in heads]).mean(0))
    assert torch.equal(found["best"], heads[0]["best"])


@dataclass(frozen=True)
class Found:
    logits: Tensor
    boxes: list[Tensor]
    names: tuple[str, ...]


class Finds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Found:
        x = self.body(x)
        return Found(self.head(x), [x], ("a", "b"))


def test_the_mean_of_dataclasses_is_one() -> None:
    train_model = fxcollab.transform(Finds(), splits=["body"], example_inputs=(torch.ones(2, 4),)).eval()
    heads = fxcollab.all_heads(train_model)(torch.ones(2, 4))
    mean = fxcollab.ensemble(train_model)(torch.ones(2, 4))
    assert torch.equal(mean.logits, torch.stack([head.logits for head in heads]).mean(0))
    assert torch.equal(mean.boxes[0], heads[0].boxes[0]) and mean.names == ("a", "b")
    found = fxcollab.evaluate_heads(train_model, [(torch.ones(2, 4), None)], lambda output, _: output.logits[:, 0])
    assert torch.allclose(found.ensemble.float(), mean.logits[:, 0].mean())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.body(x) * mask)


@pytest.mark.parametrize("kind", [tuple, list])
def test_inputs_may_be_listed_as_a_data_loader_does(kind: Any) -> None:
    x, mask = torch.randn(6, 4), torch.ones(6, 4)
    train_model = fxcollab.transform(TwoInputs(), splits=["body"], example_inputs=(x, mask))
    batches = [(kind([x, mask]), torch.zeros(6))]
    found = fxcollab.evaluate_heads(train_model, batches, lambda logits, labels: logits.argmax(1) != labels)
    assert found.heads.shape == (2,)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper])
def test_every_head_and_the_ensemble_are_evaluated_in_one_pass(wrap: Any) -> None:
    train_model, labels = made(SmallConvNet()), torch.tensor([0, 1, 2, 0])
    batches = [(X[:3], labels[:3]), ((X[3:],), labels[3:])]  # of different sizes

    def wrong(logits: Tensor, target: Tensor) -> Tensor:
        return logits.argmax(1) != target

    found = fxcollab.evaluate_heads(wrap(train_model), batches, wrong)
    assert train_model.training
    heads = fxcollab.all_heads(train_model.eval())(X)
    assert found.heads.tolist() == [wrong(head, labels).double().mean().item() for head in heads]
    assert found.ensemble.item() == wrong(torch.stack(heads).mean(0), labels).double().mean().item()


def test_the_original_has_the_modules_that_replaced_its_own() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    assert fxcollab.original(train_model) is model
    setattr(train_model, "1", nn.Linear(4, 2))
    assert torch.equal(fxcollab.original(train_model)(x), fxcollab.all_heads(train_model)(x)[0])
