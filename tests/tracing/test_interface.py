"""Inputs of the captured graph, with examples and without."""

from __future__ import annotations

import copy
import pickle
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


class Listed(Optional):
    def forward(
        self, x: Tensor, sizes: Any = (2, -1), kind: torch.dtype = torch.float32, shift: Any = None
    ) -> Tensor:
        return super().forward(x.to(kind).reshape(sizes), shift=shift)


CALLS: dict[str, tuple[type[nn.Module], Any, Any, Any]] = {
    "in the place of a fixed one": (Optional, {"x": X, "shift": X}, (X, None, 2.0), {"shift": X}),
    "by name": (Optional, {"x": X, "shift": X}, (), {"x": X, "mask": None, "shift": X}),
    "a list and a type": (Listed, {"x": X, "sizes": [2, 4]}, (X, [2, 4], torch.float32), {}),
    "an input behind fixed ones": (Listed, {"x": X, "shift": X}, (X, (2, -1), torch.float32, X), {}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_graph_takes_arguments_as_its_model_does(name: str, compiled: bool) -> None:
    make, example, args, kwargs = CALLS[name]
    model = make()
    train_model = fxcollab.transform(model, splits=["stem"], example_inputs=example)
    call: Any = torch.compile(train_model, backend="aot_eager", fullgraph=True) if compiled else train_model
    assert torch.equal(call(*args, **kwargs)[0], model(*args, **kwargs))
    pruned = fxcollab.prune(train_model)
    assert torch.equal(pruned(*args, **kwargs), model(*args, **kwargs))
    fxcollab.verify(model, train_model, example).raise_if_failed()


@pytest.mark.parametrize(
    ("args", "name"),
    [((X, X), "mask"), ((X, None, 3.0), "scale")],
)
def test_what_a_graph_was_not_captured_with_is_no_other_input(args: Any, name: str) -> None:
    train_model = fxcollab.transform(Optional(), splits=["stem"], example_inputs={"x": X, "shift": X})
    for call in (train_model, fxcollab.prune(train_model)):
        with pytest.raises(fxcollab.GuardError, match=f"where the argument {name} is"):
            call(*args, shift=X)


def test_an_argument_that_the_example_had_is_asked_for_by_name() -> None:
    train_model = fxcollab.transform(Optional(), splits=["stem"], example_inputs=(X, X))
    with pytest.raises(fxcollab.GuardError, match="argument mask") as caught:
        train_model(X)
    assert "give it at every call" in str(caught.value.hint)


def test_a_loaded_model_has_the_same_limitations(tmp_path: Any) -> None:
    model = Optional()
    train_model = fxcollab.transform(model, splits=["stem"], example_inputs={"x": X, "scale": 1.0})
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", model=Optional())
    assert fxcollab.summarise(loaded).limitations == fxcollab.summarise(train_model).limitations
    assert any("mask, shift are fixed" in note for note in fxcollab.summarise(loaded).limitations)


def test_examples_on_which_the_model_fails_are_refused() -> None:
    with pytest.raises(CaptureError, match="The model fails on the example inputs") as caught:
        fxcollab.transform(Optional(), splits=["stem"], example_inputs=(torch.ones(2, 5),))
    assert "RuntimeError: mat" in str(caught.value.why)
    train_model = fxcollab.transform(model := Optional(), splits=["stem"], example_inputs=(X,))
    with pytest.raises(CaptureError, match="The model fails on the example inputs"):
        fxcollab.verify(model, train_model, (torch.ones(2, 5),))


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


class Star(Net):
    def forward(self, x: Tensor, plus: bool = True, *more: Tensor, scale: float = 1.0, **named: Tensor) -> Tensor:
        for other in (*more, *named.values()):
            x = x + other if plus else x - other
        return super().forward(x * scale)


@pytest.mark.parametrize(
    ("examples", "names"),
    [
        ((X,), ["x"]),
        ((X, False, X, X), ["x", "more_0", "more_1"]),
        ({"x": X, "other": X, "scale": torch.ones(4)}, ["x", "scale", "other"]),
    ],
)
def test_unnamed_arguments_become_inputs_where_there_are_examples(examples: Any, names: list[str]) -> None:
    model = Star()
    train_model = fxcollab.transform(model, splits=["stem"], example_inputs=examples)
    assert placeholders(train_model) == names
    fxcollab.verify(model, train_model, examples).raise_if_failed()
    fxcollab.verify(model, train_model).raise_if_failed()
    given = (
        examples
        if isinstance(examples, dict)
        else dict(zip(["x", "plus", "more_0", "more_1"], examples, strict=False))
    )
    inputs = {name: given[name] for name in names}
    expected = model(**examples) if isinstance(examples, dict) else model(*examples)
    assert torch.equal(train_model(**inputs)[0], expected)
    if not isinstance(examples, dict):
        assert torch.equal(train_model(*examples)[0], expected)
    assert placeholders(fxcollab.capture(model, ["stem"])) == ["x"]


def test_an_optional_parameter_before_unnamed_ones_is_an_input_without_default() -> None:
    class Middle(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None, *more: Tensor) -> Tensor:
            return super().forward(x if mask is None else x * mask) + sum(other.sum() for other in more)

    model, examples = Middle(), (X, X, X)
    train_model = fxcollab.transform(model, splits=["stem"], example_inputs=examples)
    fxcollab.verify(model, train_model, examples).raise_if_failed()
    with pytest.raises(TypeError, match="more_0"):
        train_model(X, X)


def test_unnamed_arguments_may_be_called_like_a_named_one() -> None:
    class Same(Net):
        def forward(self, more_0: Tensor, *more: Tensor) -> Tensor:
            return super().forward(more_0 - sum(more))

    model, examples = Same(), (X, X * 2, X * 3)
    train_model = fxcollab.transform(model, splits=["stem"], example_inputs=examples)
    assert placeholders(train_model) == ["more_0", "more__0", "more__1"]
    fxcollab.verify(model, train_model, examples).raise_if_failed()


class Shifted(Net):
    pass


@pytest.mark.parametrize(
    "default",
    [torch.full((4,), 3.0), nn.Parameter(torch.full((4,), 3.0)), 3.0, float("inf"), torch.float64],
    ids=["tensor", "parameter", "number", "infinity", "dtype"],
)
def test_an_input_keeps_its_default(default: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Net, x: Tensor, shift: Any = default) -> Tensor:
        return Net.forward(self, x.to(shift).float() if isinstance(shift, torch.dtype) else x / shift)

    monkeypatch.setattr(Shifted, "forward", forward)
    model, examples = Shifted(), {"x": X, "shift": X}
    train_model = fxcollab.transform(model, splits=["stem"], example_inputs=examples)
    fxcollab.verify(model, train_model, examples).raise_if_failed()
    pruned = fxcollab.prune(pickle.loads(pickle.dumps(train_model)))
    assert torch.equal(pruned(X, X), model(X, X))
    if isinstance(default, Tensor | float):
        assert torch.equal(pruned(X), model(X)) and torch.equal(copy.deepcopy(train_model)(X)[0], model(X))


@pytest.mark.parametrize("default", [torch.relu, object(), int], ids=["function", "object", "class"])
def test_a_default_that_no_code_can_write_has_to_be_given(default: Any) -> None:
    class Shifted(Net):
        def forward(self, x: Tensor, shift: Any = default, mask: Tensor | None = None) -> Tensor:
            return super().forward(x + shift)

    model = Shifted()
    train_model = fxcollab.transform(model, splits=["stem"], example_inputs=(X, X))
    fxcollab.verify(model, train_model, (X, X)).raise_if_failed()
    with pytest.raises(TypeError, match="shift"):
        train_model(X)
