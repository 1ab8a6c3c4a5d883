"""What capture refuses, and the line it names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import CaptureError, FxCollabError, StateError
from tests.tracing.capture_helpers import Net, X


def where_of(model: nn.Module, splits: list[str], granularity: Any = "auto") -> tuple[str, CaptureError]:
    with pytest.raises(CaptureError) as caught:
        fxcollab.capture(model, splits, granularity=granularity)
    place = re.fullmatch(r"(.*):(\d+), in (\S+)", str(caught.value.where))
    assert place, caught.value.where
    file, line = place[1], int(place[2])
    with open(file) as source:  # noqa: PTH123
        return source.readlines()[line - 1].strip(), caught.value


class Asks(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:  # asks
            return self.head(x)
        return self.head(-x)


class AsksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Asks(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def test_a_refusal_names_the_line_of_the_callers_code() -> None:
    line, error = where_of(Asks(), ["stem"])
    assert line == "if x.sum() > 0:  # asks"
    assert error.what == "The forward of Asks can't be captured."
    assert "bool(gt) can't be known while tracing" in str(error.why)
    assert "put the splits at modules further out" in str(error.hint)


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_a_refusal_inside_an_opened_child_names_the_line_there(granularity: Any) -> None:
    line, error = where_of(AsksInside(), ["net.stem"], granularity)
    assert line == "if x.sum() > 0:  # asks"
    assert "Asks.forward" in str(error.where)


def test_a_model_that_resists_is_captured_where_the_code_stays_inside() -> None:
    model = AsksInside()
    assert torch.equal(fxcollab.capture(model, ["net"])(X.abs()), model(X.abs()))


def _helper(x: Tensor) -> list[Tensor]:
    return list(x)  # iterates


class Iterates(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack(_helper(self.stem(x))))


def test_a_helper_that_resists_becomes_one_node_and_asks_at_every_call() -> None:
    model = Iterates()
    captured = fxcollab.capture(model, ["stem"])
    [node] = [node for node in captured.graph.nodes if node.target is _helper]
    assert node.op == "call_function"
    for batch in (1, 2, 5):
        assert torch.equal(captured(X[:1].expand(batch, -1)), model(X[:1].expand(batch, -1)))
    assert any(
        "_helper can't be traced: calls of it are one node" in note for note in captured.meta["fxcollab_limitations"]
    )
    assert fxcollab.verify(model, fxcollab.transform(model, splits=["stem"], pattern="simple"), (X,))


def _helper_of_a_module(module: nn.Module, x: Tensor) -> Tensor:
    return module(x) if x.sum() > 0 else x  # a module can't be the argument of a node


def test_a_refusal_in_a_helper_names_the_helpers_line() -> None:
    class Refuses(Net):
        def forward(self, x: Tensor) -> Tensor:
            return _helper_of_a_module(self.head, self.stem(x))

    line, _ = where_of(Refuses(), ["stem"])
    assert line.startswith("return module(x) if x.sum() > 0 else x")


class Resists(Net):
    """Asks about shapes in its own forward: only an example can answer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[1] != 4 or x.dim() != 2:
            raise ValueError(f"unexpected {x.shape}")
        parts = [x[:, i] for i in range(x.size(1))]
        batch, *rest = x.shape
        x = torch.stack(parts, dim=len(rest)).view(batch, *rest)
        return self.head(x)


@pytest.mark.parametrize("examples", [None, (torch.ones(2, 4),)], ids=["guessed", "given"])
def test_questions_about_shapes_are_answered_by_an_example_and_sizes_stay_symbolic(examples: Any) -> None:
    model = Resists()
    captured = fxcollab.capture(model, ["stem"], examples)
    for batch in (1, 2, 7):
        assert torch.equal(captured(torch.ones(batch, 4)), model(torch.ones(batch, 4)))
    notes = [note for note in captured.meta["fxcollab_limitations"] if "was taken from an example input" in note]
    assert len(notes) >= 2 and all("test_refusals.py:" in note for note in notes)


class MaybeMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = Pair(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, flip: bool = False) -> Tensor:
        x, mask = self.embed(x)
        if mask is not None and mask.any():
            x = x * mask
        if x.shape[-1] == 4:
            x = self.body(x)
        if scale is not None:
            x = x * scale
        return self.head(-x if flip else x)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x + 1, None


def test_what_is_none_for_the_example_is_none() -> None:
    model = MaybeMask()
    assert torch.equal(fxcollab.capture(model, ["body"], (X,))(X), model(X))


def test_given_tensors_are_inputs_and_other_given_values_are_fixed() -> None:
    model, examples = MaybeMask(), {"x": X, "scale": torch.tensor(2.0), "flip": True}
    train_model = fxcollab.transform(model, splits=["body"], pattern="simple", example_inputs=examples)
    assert [node.name for node in train_model.graph.find_nodes(op="placeholder")] == ["x", "scale"]
    assert torch.equal(train_model(X, torch.tensor(3.0))[0], model(X, torch.tensor(3.0), flip=True))
    assert fxcollab.verify(model, train_model)


def test_nodes_carry_the_line_of_the_callers_code() -> None:
    captured = fxcollab.capture(Net(), ["body.0"])
    node = next(n for n in captured.graph.nodes if n.name == "head")
    assert "self.head(self.body(self.stem(x)))" in str(node.stack_trace).splitlines()[-1]


def test_lazy_modules_are_refused_before_their_first_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(CaptureError, match="parameters without a shape") as caught:
        fxcollab.transform(model, splits=["0"])
    assert caught.value.where == "1.weight, 1.bias"
    model(X)
    fxcollab.verify(model, fxcollab.transform(model, splits=["0"]), (X,)).raise_if_failed()


@pytest.mark.parametrize(
    ("factory", "what"),
    [(lambda: 3, "The factory returned something of type int, not a module."), (7, "model is of type int.")],
)
def test_what_is_no_model_is_refused(factory: Any, what: str) -> None:
    with pytest.raises(FxCollabError) as caught:
        fxcollab.transform(factory, splits=["a"])
    assert caught.value.what == what


@pytest.mark.parametrize("peers", ["peers", "others"])
def test_a_training_model_is_not_transformed_again(peers: str) -> None:
    train_model = fxcollab.transform(Net(), splits=["stem"])
    with pytest.raises(StateError, match="is a training model already") as caught:
        fxcollab.transform(train_model, splits=["stem"], peers=peers)
    assert "fxcollab.original(train_model)" in str(caught.value.hint)
    fxcollab.transform(fxcollab.original(train_model), splits=["stem"])


def test_a_model_with_peers_of_its_own_is_refused_unless_renamed() -> None:
    model = Net()
    model.peers = nn.Linear(1, 1)
    with pytest.raises(StateError, match="has an attribute 'peers' of its own"):
        fxcollab.transform(model, splits=["stem"])
    train_model = fxcollab.transform(model, splits=["stem"], peers="others")
    assert any(key.startswith("others.b1.head") for key in train_model.state_dict())
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
