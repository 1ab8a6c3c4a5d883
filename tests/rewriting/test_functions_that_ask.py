"""Functions that ask about their arguments are one node: what they weren't seen to write, they must not write."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from fxcollab import StateError
from fxcollab.runtime.operators import ReadsOnly
from tests.rewriting.hazard_helpers import proven

FEW, MANY = (torch.randn(size, 4, generator=torch.Generator().manual_seed(1)) for size in (3, 6))
pytestmark = pytest.mark.filterwarnings("ignore:limitation")


def added_if_many(value: Tensor, other: Tensor) -> Tensor:
    if value.shape[0] > 4:
        value.add_(other)
    return other * 2


def noted_if_many(values: dict[str, Tensor], other: Tensor) -> Tensor:
    if other.shape[0] > 4:
        values["value"] = other
    return other * 2


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def kept_if_many(holder: Holder, other: Tensor) -> Tensor:
    if other.shape[0] > 4:
        holder.value = other
    return other * 2


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split, self.late, self.head = (nn.Linear(4, 4) for _ in range(4))


class ReadByTheTrunk(Parts):
    """What is before the split reads the value after the function behind it may have written into it."""

    def forward(self, x: Tensor) -> Any:
        value = self.stem(x).tanh()
        result = added_if_many(value, self.split(x).relu())
        return self.head(result) + self.late(value)


class CrossesTwice(Parts):
    """The value crosses, and so does a view of it, which is read after the function."""

    def forward(self, x: Tensor) -> Any:
        value = self.stem(x).tanh()
        view = value[:, :2]
        result = added_if_many(value, self.split(x).relu())
        return self.head(result) + view.sum(1, keepdim=True)


class CalledByTheTrunk(Parts):
    """The function is called in the trunk, after what is behind the split has read the value."""

    def forward(self, x: Tensor) -> Any:
        value = self.stem(x).tanh()
        behind = self.head(self.split(x)) + value
        return behind * self.late(added_if_many(value, x))


class IntoAPrivateCopy(Parts):
    """Only what lies behind the function reads what it may write into, a buffer or what is made behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        value = self.split(x).relu()
        result = through_data_if_many(value, self.sums)
        return self.head(result) + through_data_if_many(self.late(value).detach(), value)


def through_data_if_many(value: Tensor, other: Tensor) -> Tensor:
    if value.shape[0] > 4:
        value.data.mul_(2)
        other.data.add_(1)
    return value + other


@pytest.mark.parametrize("net", [CalledByTheTrunk, IntoAPrivateCopy])
def test_where_branches_have_copies_it_may_write_for_other_inputs(net: type[Parts]) -> None:
    model = net()
    train_model = proven(model, ["split"], (FEW,))
    for values in (MANY, FEW):
        with torch.no_grad():
            heads, expected = copy.deepcopy(train_model)(values), copy.deepcopy(model)(values)
        assert torch.equal(heads[0], expected)
        fxcollab.verify(model, train_model, (values,)).raise_if_failed()


@pytest.mark.parametrize("net", [ReadByTheTrunk, CrossesTwice])
def test_a_function_that_writes_for_other_inputs_raises(net: type[Parts]) -> None:
    model = net()
    train_model = proven(model, ["split"], (FEW,))
    pruned = fxcollab.prune(train_model, 0)
    assert all(not isinstance(node.target, ReadsOnly) for node in pruned.graph.nodes)
    with pytest.raises(StateError, match=r"added_if_many\(\) writes into what it is given"), torch.no_grad():
        train_model(MANY)
    with torch.no_grad():
        assert torch.equal(pruned(MANY), model(MANY))


@pytest.mark.parametrize("net", [ReadByTheTrunk, CalledByTheTrunk])
def test_where_it_is_seen_to_write_all_readers_see_the_write(net: type[Parts]) -> None:
    model = net()
    with torch.no_grad():
        train_model = fxcollab.transform(model, "hierarchical", ["split"], example_inputs=(MANY,), seed=0)
        for values in (FEW, MANY):
            torch.testing.assert_close(train_model(values)[0], model(values), rtol=0, atol=0)


class WritesBothIfMany(Parts):
    """The function writes into one of two crossing values; for more samples into the other too."""

    def forward(self, x: Tensor) -> Any:
        one, other = self.stem(x).tanh(), self.late(x).relu()
        result = both_added_if_many(one, self.split(x), other=other)
        return self.head(result) + one * other


def both_added_if_many(one: Tensor, third: Tensor, *, other: Tensor) -> Tensor:
    one.add_(1)
    if one.shape[0] > 4:
        other.add_(1)
    return one.relu() * third


def test_what_it_was_seen_to_write_it_may_and_nothing_else() -> None:
    model = WritesBothIfMany()
    train_model = proven(model, ["split"], (FEW,))
    assert {node.target.read for node in train_model.graph.nodes if isinstance(node.target, ReadsOnly)} == {
        (1, "other")
    }
    with pytest.raises(StateError, match=r"both_added_if_many\(\) writes"), torch.no_grad():
        train_model(MANY)


def test_compiled_code_raises_too() -> None:
    model = ReadByTheTrunk()
    compiled = torch.compile(proven(model, ["split"], (FEW,)), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(FEW)[0], model(FEW))
        with pytest.raises(Exception, match=r"Runtime assertion failed|writes into"):
            compiled(MANY)


@pytest.mark.parametrize(
    "function, value", [(noted_if_many, {"value": FEW}), (kept_if_many, Holder(FEW))], ids=["a dict", "an object"]
)
def test_changes_of_dicts_and_objects_raise(function: Any, value: Any) -> None:
    call = ReadsOnly(function, (0,))
    assert torch.equal(call(value, FEW), FEW * 2)
    with pytest.raises(StateError, match="writes into what it is given"):
        call(value, MANY)


class AsksAgain(Parts):
    """After the function, the forward goes another way for other inputs."""

    def forward(self, x: Tensor) -> Any:
        result = added_if_many(x, x)
        return self.head(self.split(result if result.sum() > 1 else -result))


def test_in_eval_mode_nothing_is_written_twice() -> None:
    model = AsksAgain().eval()
    train_model = fxcollab.transform(model, "hierarchical", ["split"], example_inputs=(FEW.abs(),), seed=0).eval()
    given = -MANY.abs()
    with pytest.raises(fxcollab.GuardError), torch.no_grad():
        train_model(given)


def test_a_branch_with_such_a_function_can_be_computed_again() -> None:
    train_model = proven(CrossesTwice(), ["split"], (FEW,), recompute="heads")
    with pytest.raises(StateError, match="writes into what it is given"), torch.no_grad():
        train_model(MANY)
