"""In-place writes into values that cross a split: each branch gets a private copy where it needs one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rewriting.hazard_helpers import Stem, copies, proven, rescales
from tests.speeds import slow_but


class WritesIntoView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.view(-1)[::2].mul_(3)
        return x * 2


class WritesHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WritesUntraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.numel() and float(x.detach().sum()) > 1e9:
            return x
        return x.add_(1).mul_(x.sign())


class WritesItems(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = x[:, 1] * 2
        return x


class WritesUnderHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda module, inputs: (inputs[0].add_(1),))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("fanout", slow_but([2], [2, 3]))
@pytest.mark.parametrize(
    "behind",
    [
        nn.ReLU(inplace=True),
        pytest.param(nn.LeakyReLU(0.1, inplace=True), marks=pytest.mark.slow),
        pytest.param(nn.ELU(inplace=True), marks=pytest.mark.slow),
        nn.Dropout(0.5, inplace=True),
        pytest.param(nn.Sequential(nn.Identity(), nn.Hardtanh(inplace=True)), marks=pytest.mark.slow),
        WritesIntoView(),
        WritesHidden(),
        WritesUntraceable(),
        pytest.param(WritesItems(), marks=pytest.mark.slow),
        WritesUnderHook(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_that_writes_gets_a_copy_in_each_branch(behind: nn.Module, fanout: int) -> None:
    train_model = proven(Stem(behind), ["stem"], fanouts=(fanout,))
    assert copies(train_model) == fanout


@pytest.mark.parametrize(
    "behind",
    [
        pytest.param(nn.ReLU(), marks=pytest.mark.slow),
        pytest.param(nn.LeakyReLU(0.1), marks=pytest.mark.slow),
        nn.Dropout(0.5),
        pytest.param(nn.Identity(), marks=pytest.mark.slow),
        nn.Flatten(),
        pytest.param(nn.Unflatten(1, (2, 2)), marks=pytest.mark.slow),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(True)),
        pytest.param(nn.Sequential(nn.LayerNorm(4), nn.Hardtanh(0, 1, True)), marks=pytest.mark.slow),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_that_writes_nothing_shared_gets_none(behind: nn.Module) -> None:
    model = Stem(nn.Sequential(behind, nn.Flatten()))
    assert copies(proven(model, ["stem"])) == 0


def test_a_write_before_the_split_needs_no_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    assert copies(proven(model, ["1"])) == 0


FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {}


def forward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    FORWARDS[function.__name__] = function
    return function


@forward
def plus_equals(x: Tensor) -> Tensor:
    x += 1
    return x


@forward
def times_equals_of_an_alias(x: Tensor) -> Tensor:
    alias = x
    x *= 3
    return alias + x


@forward
def functional_relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


@forward
def functional_relu_by_position(x: Tensor) -> Tensor:
    F.leaky_relu(x, 0.1, True)
    return x


@forward
def method_with_underscore(x: Tensor) -> Tensor:
    x.mul_(2).clamp_(-1, 1)
    return x


@forward
def through_a_view(x: Tensor) -> Tensor:
    x.view(-1).add_(1)
    return x


@forward
def through_a_slice(x: Tensor) -> Tensor:
    x[:, :2].add_(x[:, 2:].detach())
    return x


@forward
def setitem(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


@forward
def out_argument(x: Tensor) -> Tensor:
    with torch.no_grad():
        torch.add(x, 1, out=x)
    return x


@pytest.mark.parametrize("pattern", slow_but(["hierarchical"], ["hierarchical", "multi-instance"]))
@pytest.mark.parametrize("function", FORWARDS.values(), ids=FORWARDS.keys())
def test_a_function_that_writes_gets_a_copy_in_each_branch(
    function: Callable[[Tensor], Tensor], pattern: str
) -> None:
    class Writes(Stem):
        def forward(self, x: Tensor) -> Tensor:
            if pattern == "hierarchical":
                x = self.stem(x)
            return self.head(self.behind(function(x)))

    train_model = proven(Writes(), ["stem"] if pattern == "hierarchical" else [], pattern=pattern)
    assert copies(train_model) == 2


@pytest.mark.parametrize("heads", slow_but([3], [2, 3]))
def test_independent_instances_dont_write_into_each_others_input(heads: int) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    train_model = proven(model, [], pattern="multi-instance", heads=heads)
    assert copies(train_model) == heads


def test_each_level_that_writes_gets_copies_of_its_own() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x * 2)
            x += y.detach().sum()
            z = y + x
            x -= 1
            return self.c(z * x)

    assert copies(proven(Writes(), ["a", "b"])) == 4


def test_a_trunk_write_between_two_reads_of_a_crossing_value() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shift, self.b = nn.Linear(4, 4), Shift(), nn.Linear(4, 4)
            self.late = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            y = self.b(self.shift(a)) + a
            a.add_(self.late)
            return y + a

    train_model = proven(Late(), ["shift"])
    assert len(rescales(train_model)) == 3


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_a_trunk_that_writes_into_the_input() -> None:
    class Writes(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    assert copies(proven(Writes(), ["stem"])) == 0


def test_a_split_whose_value_reaches_the_output_by_being_written() -> None:
    class Fills(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            out = torch.zeros_like(x)
            out[:, :2] = self.behind(x)[:, 2:]
            return self.head(out)

    proven(Fills(nn.Linear(4, 4)), ["behind"])
