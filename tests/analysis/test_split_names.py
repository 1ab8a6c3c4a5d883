"""What a split's name means."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, fx, nn

import fxcollab
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
