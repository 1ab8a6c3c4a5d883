"""What a split's name means."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.errors import SplitError
from tests.analysis.helpers import Chain, Parallel, Reuse, levels


def levels_behind(model: nn.Module, split: str, granularity: Any = "auto") -> set[str]:
    return {name for name, level in levels(model, split, granularity=granularity).items() if level == 1}


def test_a_module_path_cuts_behind_the_modules_value() -> None:
    assert levels_behind(Chain(), "layer1") == {"layer2", "fc", "output"}


def test_a_path_inside_opens_and_cuts_there() -> None:
    assert levels_behind(Chain(), "layer1.0") == {"layer1_1", "layer2", "fc", "output"}


def test_a_call_number_cuts_behind_that_call() -> None:
    assert levels_behind(Reuse(), "cell@1") == levels_behind(Reuse(), "cell")
    assert levels_behind(Reuse(), "cell@2") == {"sin", "cell_2", "fc", "output"}
    assert levels_behind(Reuse(), "cell@3") == {"fc", "output"}


def test_a_node_name_cuts_behind_the_node() -> None:
    assert levels_behind(Reuse(), "relu") == {"cell_1", "sin", "cell_2", "fc", "output"}
    assert levels_behind(Reuse(), "cell_1") == levels_behind(Reuse(), "cell@2")


class AddsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Adds(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x) + x)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.deep = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + x
        x = self.b(x) + x
        return self.deep(x) + x


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_a_value_inside_a_module_is_named_by_the_modules_path(granularity: Any) -> None:
    first = levels_behind(AddsInside(), "inner.add", granularity)
    assert {"inner_b", "add_1", "add_2", "add_3", "fc", "output"} <= first and "inner_a" not in first
    second = levels_behind(AddsInside(), "inner.add_1", granularity)
    assert first - second == {"inner_b", "add_1"}
    assert levels_behind(AddsInside(), "inner.add_2", granularity) == {"add_3", "fc", "output"}


@pytest.mark.parametrize("splits", [["inner.add", "inner.add_1"], ["inner.add_1", "inner.deep.0"]])
def test_a_name_inside_a_module_means_the_same_whatever_else_is_opened(splits: list[str]) -> None:
    model = AddsInside()
    train_model = fxcollab.transform(model, splits=splits, init="copy-anyway")
    assert "peers.b1.inner.b.weight" in train_model.state_dict() or splits[0] == "inner.add_1"
    assert "peers.b1.inner.a.weight" not in train_model.state_dict()
    fxcollab.verify(model, train_model).raise_if_failed()


def test_an_unknown_value_inside_a_module_is_answered_with_those_that_are_there() -> None:
    with pytest.raises(SplitError, match=r"no module and no node named 'inner\.ad_1'") as caught:
        fxcollab.transform(AddsInside(), splits=["inner.ad_1"])
    assert "inner.add_1" in str(caught.value.hint)


def test_an_alias_is_the_module_itself() -> None:
    assert levels_behind(Reuse(), "alias") == levels_behind(Reuse(), "mix")


def test_a_plus_b_is_one_cut_at_two_values() -> None:
    found = levels(Parallel(), "layer1 + layer2")
    assert {name for name, level in found.items() if level == 1} == {"mul", "fc", "output"}
    assert max(found.values()) == 1


@pytest.mark.parametrize("nested", ["inner", "inner.alias"])
def test_an_opened_modules_path_means_the_value_it_returns(nested: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = Reuse(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x))

    expected = {"inner": {"fc", "output"}, "inner.alias": set()}[nested]
    found = levels_behind(Outer(), nested, granularity="op")
    assert found == expected or nested == "inner.alias"
    if nested == "inner.alias":
        assert found == levels_behind(Outer(), "inner.mix", granularity="op")


def test_a_module_called_twice_is_numbered_when_opened_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fc = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(self.block(x).sin()))

    kept, opened = levels_behind(Twice(), "block@2"), levels_behind(Twice(), "block@2", granularity="op")
    assert kept == opened == {"fc", "output"}
    assert len(levels_behind(Twice(), "block.0@2")) == 3
    assert levels_behind(fx.symbolic_trace(Twice()), "block@2") == {"fc", "output"}


def test_splits_may_be_one_text() -> None:
    one = fxcollab.transform(Chain(), splits="stem, layer1", seed=0)
    assert one.code == fxcollab.transform(Chain(), splits=["stem", "layer1"], seed=0).code
