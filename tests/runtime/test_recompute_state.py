"""State and random numbers of branches that are computed again."""

from __future__ import annotations

import random
from collections import UserList, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxcollab
from fxcollab.errors import PatternError, StateError
from tests.networks import TrunkGoesOn
from tests.references import SmallConvNet
from tests.runtime.recompute_helpers import (
    TREES,
    Dropping,
    RememberingNet,
    X,
    assert_equal,
    loss_of,
    nothing_computed_again,
    pair,
    step,
)
from tests.speeds import slow_but


def test_random_numbers_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, again = pair(Dropping, splits=["first", "second"])
    with nothing_computed_again(monkeypatch):
        expected = step(again)
        following = torch.rand(3)
    assert_equal(step(again), expected)
    assert torch.equal(torch.rand(3), following)


class Drawing(nn.Module):
    """Draws from Python's generator, inside a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * random.random()


class DrawingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drawing, self.last = nn.Linear(768, 8), Drawing(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drawing(self.first(x.flatten(1))))


def test_pythons_random_numbers_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, again = pair(DrawingNet, pattern="simple", splits=["first"])
    found = []
    for patched in (True, False):
        random.seed(3)
        if patched:
            with nothing_computed_again(monkeypatch):
                found.append(step(again))
        else:
            found.append(step(again))
        found[-1] |= {"following": torch.tensor(random.random())}
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("granularity", slow_but(["auto"], ["auto", "op"]))
@pytest.mark.filterwarnings("ignore:limitation")
def test_state_that_a_branch_reads_and_writes_is_read_as_it_was_and_written_once(granularity: str) -> None:
    plain, again = pair(RememberingNet, pattern="simple", splits=["first"], granularity=granularity)
    for _ in range(2):
        expected, found = step(plain), step(again)
    assert_equal(found, expected)
    assert found["memory.scale"][0] == 0.25


class Holding(nn.Module):
    """Keeps things between calls wherever Python can, and computes with all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls, self.seen = nn.Linear(8, 8), 0, torch.ones(8)
        self.cache: dict[str, list[Tensor]] = {"means": []}
        self.box = SimpleNamespace(count=0, pairs=deque([(torch.zeros(8), 0)], maxlen=2))
        self.own = torch.Generator().manual_seed(3)
        self.foreign, self.python = np.random.default_rng(4), random.Random(5)
        self.table = np.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.box.count += 2
        self.table *= 0.5
        y = torch.tanh(self.fc(x)) * self.seen.clone() * self.calls + self.box.count + float(self.table[0])
        y = y + torch.stack([*self.cache["means"], *(pair[0].mean() for pair in self.box.pairs)]).sum()
        self.cache["means"].append(y.mean().detach())
        self.box.pairs.append((y.detach()[0], self.calls))
        self.seen.mul_(0.9)
        noise = torch.rand(8, generator=self.own) + self.foreign.random() + self.python.random()
        return torch.sin(y) * noise.to(y.dtype)


class HoldingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.holding, self.last = nn.Linear(768, 8), Holding(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.holding(self.first(x.flatten(1))))


def test_whatever_a_module_holds_is_as_it_was_in_the_second_pass() -> None:
    plain, again = pair(HoldingNet, pattern="simple", splits=["first"])
    for _ in range(3):
        expected, found = step(plain), step(again)
        assert_equal(found, expected)
    for name in ("holding", "peers.b1.holding"):
        here, there = again.get_submodule(name), plain.get_submodule(name)
        assert here.calls == there.calls == 3 and here.box.count == there.box.count == 6
        assert len(here.cache["means"]) == len(there.cache["means"]) == 3
        assert here.python.random() == there.python.random()
        assert torch.equal(here.seen, there.seen) and (here.table == there.table).all()


class Notes(dict[str, int]):
    """A dictionary of the user's."""


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class State(NamedTuple):
    seen: Tensor


class HoldsRareThings(nn.Module):
    """Subclasses of containers, slots, tensors in tuples, views, and what belongs to the class."""

    total = 0
    table: ClassVar[dict[str, int]] = {"calls": 0}

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.notes, self.slotted, self.state = nn.Linear(8, 8), Notes(n=0), Slotted(), State(torch.ones(8))
        self.listed = UserList([0])
        grid = torch.ones(2, 8)
        self.register_buffer("grid", grid)
        self.register_buffer("row", grid[0])

    def forward(self, x: Tensor) -> Tensor:
        type(self).total += 1
        self.table["calls"] += 1
        self.notes["n"] += 1
        self.slotted.count += 1
        self.listed[0] += 1
        self.state.seen.mul_(0.9)
        self.grid.mul_(0.8)
        scale = self.notes["n"] + self.slotted.count + self.listed[0] + self.total + self.table["calls"]
        return torch.tanh(self.fc(x)) * scale * self.state.seen.clone() * self.row.clone()


class RareNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare, self.last = nn.Linear(768, 8), HoldsRareThings(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rare(self.first(x.flatten(1))))


def test_rare_things_are_as_they_were_too() -> None:
    found = []
    for model in pair(RareNet, pattern="simple", splits=["first"]):
        HoldsRareThings.total, HoldsRareThings.table["calls"] = 0, 0
        found.append([step(model) for _ in range(2)][-1])
        assert HoldsRareThings.total == HoldsRareThings.table["calls"] == 4
    assert_equal(found[1], found[0])


class Averages(nn.Module):
    """A running mean of the user's own, which is read once it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            self.mean.lerp_(y.mean(0), 0.1)
        return torch.tanh(y - self.mean)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.fc(x)) * self.calls


class Around(nn.Module):
    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(768, 8), body(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x.flatten(1))))


@pytest.mark.parametrize(
    "body", slow_but([Averages], [Averages, Counts, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))])
)
@pytest.mark.filterwarnings("ignore:no module initialises")
def test_what_a_compiler_cannot_compute_again_runs_as_it_is(body: Callable[[], nn.Module]) -> None:
    plain, again = pair(lambda: Around(body), pattern="simple", splits=["first"])
    compiled = torch.compile(again, backend="aot_eager")
    for _ in range(2):
        expected, found = step(plain), step(compiled)
        for name, value in expected.items():
            assert_close(found[f"_orig_mod.{name}"], value)


def test_weights_that_were_changed_before_the_backward_are_refused() -> None:
    _, again = pair(lambda: Around(Counts), pattern="simple", splits=["first"])
    loss = loss_of(again(X))
    with torch.no_grad():
        again.get_parameter("peers.b1.body.fc.weight").mul_(2)
    with pytest.raises(StateError, match=r"(?s)written since the forward.*branch_b1, Linear\.weight"):
        loss.backward()


class CallsLate(nn.Module):
    """The trunk calls a module that counts after what lies behind the split has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.counts, self.last = nn.Linear(768, 8), nn.Linear(8, 8), Counts(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        return self.last(self.counts(self.first(x)) + self.counts(x))


class HoldsAnIterator(Averages):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(1000))


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (CallsLate, r"counts_1.*'counts'.*calls the same module"),
        (lambda: Around(HoldsAnIterator), "numbers is an iterator"),
    ],
)
@pytest.mark.filterwarnings("ignore:limitation")
def test_state_that_would_be_another_in_the_second_pass_is_refused(
    factory: Callable[[], nn.Module], why: str
) -> None:
    with pytest.raises(PatternError, match=f"(?s)can't be computed again.*{why}|{why}"):
        fxcollab.transform(factory(), "simple", ["first"], recompute="heads")


class CalledOnBothSides(nn.Module):
    """A BatchNorm and a weight that are used in the trunk and behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.norm = nn.Linear(768, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.norm(self.embed(x.flatten(1)))))
        return self.last(self.norm(torch.tanh(self.second(x))))


@pytest.mark.filterwarnings("ignore:limitation")
def test_what_is_used_on_both_sides_of_a_split_is_computed_again() -> None:
    plain, again = pair(lambda: CalledOnBothSides().double(), pattern="simple", splits=["first"], heads=3)
    for _ in range(2):
        expected, found = step(plain, X.double()), step(again, X.double())
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:limitation")
def test_statistics_that_would_be_gathered_in_another_order_are_refused() -> None:
    with pytest.raises(PatternError, match=r"(?s)can't be computed again: b0.*norm_1.*between 'norm' and 'add'"):
        fxcollab.transform(TrunkGoesOn(), "simple", ["first"], recompute="heads")


def test_a_mode_that_changes_before_the_backward_changes_nothing() -> None:
    plain, again = pair(SmallConvNet, **TREES["simple"])
    expected = step(plain)
    loss = loss_of(again(X))
    again.eval()
    loss.backward()
    assert_equal(
        {name: p.grad for name, p in again.named_parameters()}, {n: expected[n] for n, _ in again.named_parameters()}
    )
    assert not any(module.training for module in again.modules())


class WritesItsWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


def test_a_forward_that_writes_into_a_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), WritesItsWeight(8, 5))
    again = fxcollab.transform(model, "simple", ["1"], recompute="heads")
    with pytest.raises(StateError, match=r"(?s)writes into a parameter.*WritesItsWeight.weight"):
        again(X)
