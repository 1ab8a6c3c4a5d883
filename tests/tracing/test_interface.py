"""Inputs of the captured graph, with examples and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import CaptureError
from tests.tracing.capture_helpers import Net, X


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, shift: Tensor | None = None
    ) -> Tensor:
        x = self.stem(x) * scale
        if mask is not None:
            x = x * mask
        if shift is not None:
            x = x + shift
        return self.head(x)


def placeholders(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.find_nodes(op="placeholder")]


def test_optional_inputs_are_fixed_without_an_example() -> None:
    model = Optional()
    captured = fxcollab.capture(model, ["stem"])
    assert placeholders(captured) == ["x"]
    assert torch.equal(captured(X), model(X))
    train_model = fxcollab.transform(model, splits=["stem"])
    notes = fxcollab.verify(model, train_model, (X,)).limitations
    assert any("mask, scale, shift are fixed at their defaults" in note for note in notes)


@pytest.mark.parametrize(
    ("example", "inputs"),
    [
        ((X, X.sign()), ["x", "mask"]),
        ({"x": X, "mask": X.sign()}, ["x", "mask"]),
        ({"x": X, "shift": X}, ["x", "shift"]),
        ({"shift": X, "mask": X, "x": X}, ["x", "mask", "shift"]),
    ],
)
def test_optional_inputs_are_kept_with_an_example(example: Any, inputs: list[str]) -> None:
    model = Optional()
    captured = fxcollab.capture(model, ["stem"], example)
    assert placeholders(captured) == inputs
    keywords = example if isinstance(example, dict) else dict(zip(inputs, example, strict=True))
    assert torch.equal(captured(**keywords), model(**keywords))


def test_a_kept_optional_input_keeps_its_default() -> None:
    captured = fxcollab.capture(Optional(), ["stem"], (X, X))
    assert captured.graph.find_nodes(op="placeholder")[1].args == (None,)


@pytest.mark.parametrize(
    ("example", "why"), [((X, X, X, X, X), "too many positional"), ({"y": X}, "missing a required"), ((), "x")]
)
def test_examples_that_dont_fit_are_refused(example: Any, why: str) -> None:
    with pytest.raises(CaptureError, match="The example inputs don't fit the model") as caught:
        fxcollab.capture(Optional(), ["stem"], example)
    assert why in str(caught.value.why)
    assert str(caught.value.where).startswith("Optional.forward(x")


def test_unnamed_arguments_cant_become_inputs() -> None:
    class Star(Net):
        def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
            return super().forward(x)

    assert placeholders(fxcollab.capture(Star(), ["stem"])) == ["x"]
    with pytest.raises(CaptureError, match=r"arrive through \*args or \*\*kwargs") as caught:
        fxcollab.capture(Star(), ["stem"], (X, X))
    assert "wrap the model" in str(caught.value.hint)
