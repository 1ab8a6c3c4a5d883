"""What crosses a split, and where: skips, several values, outputs, values without gradient."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from tests.rewriting.hazard_helpers import Skips, Stem, X, copies, proven, rescales
from tests.speeds import slow_but

# ------------------------------------------------------------------------------------ what crosses, and where


@pytest.mark.parametrize(
    ("splits", "fanouts", "factors"),
    [
        pytest.param(["a"], (3,), {1 / 3}, marks=pytest.mark.slow),
        pytest.param(["a", "b"], (2, 2), {1 / 2, 1 / 4}, marks=pytest.mark.slow),
        pytest.param(["a", "b"], (2, 3), {1 / 2, 1 / 3, 1 / 6}, marks=pytest.mark.slow),
        pytest.param(["a", "b"], (4, 2), {1 / 4, 1 / 2, 1 / 8}, marks=pytest.mark.slow),
        (["a", "b", "c"], (2, 2, 2), {1 / 2, 1 / 4, 1 / 8}),
    ],
)
def test_skips_over_one_and_more_splits(splits: list[str], fanouts: tuple[int, ...], factors: set[float]) -> None:
    assert set(rescales(proven(Skips(), splits, fanouts=fanouts))) == factors


def test_without_rescaling_gradients_are_the_plain_sum() -> None:
    assert rescales(proven(Skips(), ["a", "b"], rescale=False)) == []


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.d(self.c(a) + b * a)


@pytest.mark.parametrize(
    "splits", slow_but([["a + b", "c"], ["a", "c"]], [["a+b"], ["a + b", "c"], ["b"], ["c"], ["a", "c"]])
)
def test_several_values_cross_at_once(splits: list[str]) -> None:
    proven(TwoPaths(), splits)


class Mixed(nn.Module):
    """Returns what no one would expect to cross a split."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.inner(x)
        return y, y > 0, y.argmax(1), None, (y * 2, 3), {"key": y.sin()}, "text", torch.float32


class MixedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.head = Mixed(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, mask, index, _, (twice, three), named, _, dtype = self.mixed(x)
        z = self.head(torch.where(mask, y, twice) * three + named["key"])
        return z.gather(1, index[:, None]).to(dtype)


def test_integers_masks_numbers_and_none_cross() -> None:
    proven(MixedNet(), ["mixed"])


def test_sizes_cross_without_a_rescale() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            batch, width = x.shape
            y = self.stem(x)
            mask = (x.detach() > 0).to(torch.int64)
            return self.head(y.reshape(batch, width) * mask)

    train_model = proven(Sizes(), ["stem"])
    rescaled = {node.args[0].name for node in train_model.graph.nodes if node.target is fxcollab.rescale}
    assert "stem" in rescaled
    assert not {"getitem", "getitem_1"} & rescaled
    assert len(train_model(torch.randn(7, 4))) == 2


# --------------------------------------------------------------------------------------------------- outputs

Named = namedtuple("Named", ["trunk", "middle", "top"])


class Penalised(nn.Module):
    """A module that returns a penalty, too, once that is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.on = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        value = self.linear(x)
        return value, value.pow(2).mean() if self.on else 0


class PenalisedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = Penalised(), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, penalty = self.stem(x)
        return self.head(self.middle(value)) + penalty


def test_what_is_a_number_at_first_and_a_tensor_later_is_rescaled() -> None:
    model = PenalisedNet()
    train_model = proven(model, ["middle"])
    model.stem.on = True
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


@dataclass
class Record:
    trunk: Tensor
    top: Tensor
    note: str = "note"


torch.utils._pytree.register_dataclass(Record)


STRUCTURES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "tuple": lambda a, b, c: (a, b, c),
    "dict": lambda a, b, c: {"trunk": a, "middle": b, "top": c, "none": None, "three": 3},
    "list": lambda a, b, c: [a, (b, [c])],
    "namedtuple": lambda a, b, c: Named(a, b, c),
    "dataclass": lambda a, b, c: Record(a, c),
    "nested": lambda a, b, c: {"all": [Named(a, {"b": b}, c)], "again": (a, a)},
}


class Outputs(nn.Module):
    def __init__(self, structure: Callable[[Tensor, Tensor, Tensor], Any], act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act, self.structure = act or nn.Identity(), structure

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        b = self.b(self.act(a))
        return self.structure(a, b, self.c(b))


@pytest.mark.parametrize(
    "structure", slow_but([STRUCTURES["nested"], STRUCTURES["dataclass"]], STRUCTURES.values()), ids=STRUCTURES.keys()
)
def test_every_head_returns_its_complete_output(structure: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
    model = Outputs(structure)
    train_model = proven(model, ["a", "b"])
    outputs, expected = train_model(X), model(X)
    assert type(outputs) is tuple and len(outputs) == 4
    assert [type(head) for head in outputs] == [type(expected)] * 4
    assert copies(train_model) == 0


@pytest.mark.parametrize("splits", slow_but([["a"]], [["a"], ["b"], ["a", "b"]]))
def test_a_splits_value_is_also_an_output(splits: list[str]) -> None:
    train_model = proven(Outputs(STRUCTURES["tuple"]), splits)
    first, *others = train_model(X)
    assert all(torch.equal(first[0], other[0]) for other in others)
    assert all(not torch.equal(first[2], other[2]) for other in others)


def test_an_output_that_is_written_behind_the_split() -> None:
    train_model = proven(Outputs(STRUCTURES["tuple"], nn.ReLU(inplace=True)), ["a"])
    assert copies(train_model) == 2
    assert float(train_model(X)[0][0].detach().min()) >= 0


@pytest.mark.slow
def test_an_input_that_is_an_output() -> None:
    class Through(Stem):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, super().forward(x)

    proven(Through(), ["stem"])
    proven(Through(), [], pattern="multi-instance")


# ------------------------------------------------------------------------------------- gradients that are not


class NoGrad(Stem):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
            x += self.head.weight.mean()
        return self.head(self.behind(x))


class NoGradMethod(Stem):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.behind(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("model", slow_but([NoGrad], [NoGrad, NoGradMethod]))
def test_a_trunk_without_gradient_gets_none(model: type[Stem]) -> None:
    net = model(nn.Linear(4, 4))
    train_model = proven(net, ["stem"])
    sum(head.sum() for head in train_model(X)).backward()
    assert net.stem.weight.grad is None
    assert net.head.weight.grad is not None


def test_frozen_parameters_stay_frozen_in_every_head() -> None:
    model = Stem(nn.BatchNorm1d(4))
    model.stem.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    train_model = proven(model, ["stem"])
    assert not train_model.peers.b1.head.bias.requires_grad
    assert train_model.peers.b1.head.weight.requires_grad


@pytest.mark.slow
def test_a_detached_crossing_value() -> None:
    class Detached(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.behind(x.detach()) + x)

    proven(Detached(nn.Linear(4, 4)), ["stem"])
