"""Wrappers whose forward takes anything and hands it to the model inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from tests.speeds import slow_but
from tests.tracing.question_helpers import MORE, Net, X, agrees, proven


class Adapted(nn.Module):
    """As libraries for fine-tuning wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **{key: value for key, value in kwargs.items() if key != "adapter"})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class Positional(Adapted):
    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


class Scaled(Net):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        h = self.a(x)
        return self.tail(h if scale is None else h * scale)


@pytest.mark.parametrize("make", slow_but([Adapted], [Adapted, Positional]))
def test_a_wrapper_is_transformed_like_what_it_wraps(make: type[Adapted]) -> None:
    model = make(Adapted(Net()))
    train_model = proven(model, (X,), ["model.model.b"])
    assert agrees(train_model, model, MORE)
    pruned = fxcollab.prune(train_model, 1, into=make(Adapted(Net())))
    assert torch.equal(pruned(MORE), train_model(MORE)[1])


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [(X, X[:, :1]), {"x": X, "scale": X[:, :1]}, {"x": X, "scale": None}])
def test_its_inputs_may_be_given_by_position_or_by_name(inputs: Any) -> None:
    proven(Adapted(Scaled()), inputs, ["model.b"])


def test_without_examples_the_refusal_asks_for_them() -> None:
    with pytest.raises(fxcollab.CaptureError, match=r"(?s)no required input.*example_inputs: a tuple or a dict"):
        fxcollab.transform(Adapted(Net()), "simple", ["model.b"])


@pytest.mark.slow
def test_lora_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["b", "c", "d"])
    model = peft.get_peft_model(Net(), config)
    train_model = proven(model, (X,), ["base_model.model.b"])
    first, second = train_model(X)
    assert torch.equal(first, second)  # B is zero
