"""Levels of nodes, modules and state."""

from __future__ import annotations

from torch import Tensor

import fxcollab
from fxcollab.patterns import head_tree
from tests.analysis.helpers import Chain, Parallel, Reuse, Skips, cut, levels


def test_levels_of_a_chain() -> None:
    assert levels(Chain(), "layer1") == {
        "x": 0, "stem": 0, "layer1": 0, "layer2": 1, "fc": 1, "output": 1,
    }  # fmt: skip
    assert levels(Chain(), "stem", "layer1") == {
        "x": 0, "stem": 0, "layer1": 1, "layer2": 2, "fc": 2, "output": 2,
    }  # fmt: skip


def test_levels_with_skips_and_parameters() -> None:
    assert levels(Skips(), "a", "b") == {
        "x": 0, "count": 0, "add_": 0, "a": 0, "scale": 1, "mul": 1, "b": 1, "add": 2, "c": 2, "add_1": 2,
        "shift": 2, "sigmoid": 2, "mul_1": 2, "d": 2, "add_2": 2, "output": 2,
    }  # fmt: skip


def test_levels_of_independent_instances() -> None:
    captured = fxcollab.capture(Skips())
    found = fxcollab.partition(captured, head_tree("multi-instance"))
    assert {n.name for n, level in found.nodes[captured.graph].items() if level == 0} == {"x"}
    assert set(found.state.values()) == {1}


def test_levels_of_modules_and_state_are_the_least_of_their_uses() -> None:
    _, found = cut(Reuse(), ["mix"])
    assert found.modules == {"cell": 0, "mix": 0, "alias": 0, "fc": 1}
    assert {name: level for name, level in found.state.items() if name.endswith("weight")} == {
        "cell.weight": 0, "mix.weight": 0, "alias.weight": 0, "fc.weight": 1,
    }  # fmt: skip


def test_unused_state_stays_in_the_trunk() -> None:
    _, found = cut(Parallel(), ["stem"])
    assert found.state["never.weight"] == 0
    assert "never" not in found.modules


def test_what_depends_on_no_input_is_drawn_to_its_users() -> None:
    found = levels(Skips(), "b")
    assert (found["scale"], found["shift"], found["sigmoid"]) == (0, 1, 1)


def test_a_read_after_an_inplace_write_depends_on_the_write() -> None:
    class Writes(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.layer1(x)
            x.add_(self.layer2(y))
            return self.fc(x.sin())

    found = levels(Writes(), "layer1")
    assert (found["stem"], found["layer2"], found["add_"], found["sin"]) == (0, 1, 1, 1)
