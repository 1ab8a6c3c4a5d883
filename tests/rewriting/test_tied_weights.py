"""Parameters used on both sides of a split, registered or not."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from fxcollab import CollabGraphModule
from tests.rewriting.hazard_helpers import TOKENS, Skips, Stem, proven
from tests.speeds import slow_but


class Tied(nn.Module):
    """The classic language model: the output layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.embed(x)))


@pytest.mark.parametrize("fanout", slow_but([3], [2, 3]))
def test_a_weight_tied_over_the_split_stays_one(fanout: int) -> None:
    model = Tied()
    train_model = proven(model, ["embed"], (TOKENS,), fanouts=(fanout,))
    assert train_model.peers.b1.body.weight is not model.body.weight
    for _, parameter in train_model.peers.named_parameters():
        assert parameter.shape != (7, 4) or parameter is model.embed.weight
    train_model = pickle_free_copy(train_model)
    assert train_model.out.weight is train_model.embed.weight


def pickle_free_copy(module: CollabGraphModule) -> CollabGraphModule:
    new = copy.deepcopy(module)
    assert torch.equal(new(TOKENS)[1], module(TOKENS)[1])
    return new


class TiedTwice(nn.Module):
    """Two layers of one module kept whole share one weight, and share it with the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.pair = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.pair[0].weight = self.pair[2].weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.mid(self.stem(x))))


@pytest.mark.parametrize("splits", slow_but([["stem", "mid"]], [["stem"], ["stem", "mid"], ["mid"]]))
def test_a_weight_tied_twice_inside_a_module_and_over_the_split(splits: list[str]) -> None:
    proven(TiedTwice(), splits)


class Called(nn.Module):
    """One module called at the beginning, in the middle and at the end."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.mix, self.head = cell, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.cell(x)).tanh()
        return self.head(self.cell(self.cell(x).tanh()))


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(nn.Linear(4, 4), marks=pytest.mark.slow),
        nn.BatchNorm1d(4),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(True)),
    ],
)
@pytest.mark.parametrize(
    "splits",
    slow_but([["cell", "cell@3"]], [["cell"], ["mix"], ["cell@2"], ["cell", "mix"], ["cell", "cell@3"]]),
)
def test_a_module_called_in_trunk_and_head(cell: nn.Module, splits: list[str]) -> None:
    proven(Called(copy.deepcopy(cell)), splits, fanouts=(2, 3)[: len(splits)])


class TiedLevels(nn.Module):
    """One weight at levels 1 and 2, another at 0 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.c.weight, self.d.weight = self.b.weight, self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)).tanh()))


@pytest.mark.parametrize("fanouts", slow_but([(2, 3)], [(2, 2), (2, 3), (3, 2)]))
def test_a_weight_tied_over_two_levels(fanouts: tuple[int, ...]) -> None:
    train_model = proven(TiedLevels(), ["a", "b"], fanouts=fanouts)
    assert train_model.peers.b1_0.c.weight is train_model.peers.b1.b.weight
    assert train_model.peers.b1_1.c.weight is train_model.peers.b1.b.weight
    assert train_model.peers.b0_1.c.weight is train_model.b.weight


def test_a_functional_use_of_a_trunk_weight_behind_the_split() -> None:
    class Functional(Stem):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(self.stem(x), self.stem.weight.t()))

    proven(Functional(), ["stem"])


class Reaches(nn.Module):
    """Computes with what it reaches; ``reach`` sets how."""

    def __init__(self, reach: Callable[[Any], Any] = lambda own: own.inner) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.__dict__["reached"] = reach(self)

    def forward(self, x: Tensor) -> Tensor:
        [reached] = self.reached if isinstance(self.reached, list) else [self.reached]
        return self.inner(x) + reached(x)


HELD: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda own: own.inner,
    "list": lambda own: [own.inner],
    "partial": lambda own: functools.partial(own.inner),
    "bound method": lambda own: own.inner.forward,
    "method of its own": lambda own: types.MethodType(lambda self, x: self.inner(x), own),
}


@pytest.mark.parametrize("reach", slow_but([HELD["bound method"]], HELD.values()), ids=HELD.keys())
def test_what_a_module_reaches_of_its_own_unregistered_goes_along_with_its_peer(reach: Callable[[Any], Any]) -> None:
    train_model = proven(Stem(Reaches(reach)), ["stem"])
    assert train_model.peers.b1.behind.inner is not train_model.behind.inner
    proven(Called(Reaches(reach)), ["mix"])


def test_what_a_module_reaches_of_its_branch_unregistered_is_its_branchs() -> None:
    model = Skips()
    model.d = Reaches(lambda own: [model.c])
    train_model = proven(model, ["a"])
    assert train_model.peers.b1.d.reached[0] is train_model.peers.b1.c
    with pytest.raises(fxcollab.SplitError, match=r"'d' reads 'c\.bias' without registering it"):
        fxcollab.transform(model, splits=["a", "c"])


class Trunks(Stem):
    """Its ``behind`` computes with the weight of ``stem`` too, which ``reach`` sets."""

    def __init__(self, reach: Callable[[Any, Any], Any]) -> None:
        super().__init__(Reaches())
        self.top = nn.Linear(3, 3)
        reach(self.behind, self.stem)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(super().forward(x))


def as_a_parameter(behind: Any, stem: Any) -> None:
    behind.weight = stem.weight
    behind.reached = types.MethodType(lambda self, x: F.linear(x, self.weight), behind)


def as_a_module(behind: Any, stem: Any) -> None:
    behind.reached = stem


def as_a_parameter_of_another_module(behind: Any, stem: Any) -> None:
    behind.inner.weight = stem.weight


@pytest.mark.parametrize(
    "reach", slow_but([as_a_parameter], [as_a_parameter, as_a_module, as_a_parameter_of_another_module])
)
def test_what_a_head_registers_of_the_trunk_is_rescaled(reach: Callable[[Any, Any], Any]) -> None:
    train_model = proven(Trunks(reach), ["stem"])
    if reach is as_a_module:  # ``behind`` contains the split under another name, and is opened
        assert "self.peers.functional_call.b1.stem(" in train_model.code
        return
    assert any(parameter is train_model.stem.weight for parameter in train_model.peers.b1.behind.parameters())


def in_a_tuple(behind: Any, stem: Any) -> None:
    weights = (stem.weight,)
    behind.reached = functools.partial(lambda weights, x: F.linear(x, weights[0]), weights)


def in_a_dictionary(behind: Any, stem: Any) -> None:
    behind.__dict__["reached"] = stem


def in_a_function(behind: Any, stem: Any) -> None:
    behind.reached = lambda x: stem(x)


@pytest.mark.parametrize("reach", slow_but([in_a_function], [in_a_tuple, in_a_dictionary, in_a_function]))
def test_what_a_head_reaches_of_the_trunk_unregistered_is_refused_unless_both_lie_on_one_side(
    reach: Callable[[Any, Any], Any],
) -> None:
    with pytest.raises(fxcollab.SplitError, match=r"'behind' reads 'stem.(weight|bias)' without registering it"):
        fxcollab.transform(Trunks(reach), splits=["stem"])
    proven(Trunks(reach), ["behind"])


@pytest.mark.slow
def test_a_forward_that_was_replaced_is_the_peers_own_unless_it_reaches_it_through_the_model() -> None:
    model = Stem(Reaches())
    model.behind.forward = lambda x: model.behind.inner(x) * 2  # type: ignore[method-assign]
    with pytest.raises(fxcollab.SplitError, match=r"'behind' reads 'behind\.inner\.bias' elsewhere"):
        fxcollab.transform(model, splits=["stem"])
    behind: Any = model.behind
    behind.forward = lambda x: behind.inner(x) * 2
    proven(model, ["stem"])
    behind.forward = types.MethodType(lambda self, x: self.inner(x) * 2, behind)
    proven(model, ["stem"])


@pytest.mark.slow
def test_a_module_called_twice_inside_a_head_is_one_peer() -> None:
    class Inside(Called):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(self.cell(self.mix(x)).tanh()))

    train_model = proven(Inside(nn.Linear(4, 4)), ["mix"])
    calls = [node.target for node in train_model.graph.nodes if "cell" in str(node.target)]
    assert calls == ["cell"] * 2 + ["peers.b1.cell"] * 2
