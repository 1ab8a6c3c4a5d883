"""What random networks and the zoo have found, each shrunk to a small network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

import fxcollab
from fxcollab.errors import SplitError
from tests.rewriting.hazard_helpers import X, copies, proven
from tests.untouched import Untouched


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)


class WrittenBehindDropout(Chain):
    """In eval mode dropout returns its input, so that the write reaches what is returned beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.relu = nn.Dropout(0.3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        first = self.first(x)
        return self.head(self.relu(self.dropout(first))), first


class ReadAgainUnderAnotherName(Chain):
    """The activation in place and the value before it are one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x)
        after = F.relu(before, inplace=True)
        return self.head(after.mul_(0.5)) + before.detach().sum()


class WritesBothNames(Chain):
    """Behind the split, one operation gets two names of one tensor, and writes it."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x)
        after = F.relu(before, inplace=True)
        before += after
        return self.head(after)


class WritesOutOfTwoViews(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        view, after = h.view(-1), F.relu(h, inplace=True)
        torch.add(view, after.reshape(-1), out=view)
        return self.head(after)


@pytest.mark.parametrize(
    "model, split",
    [
        (WrittenBehindDropout(), "dropout"),
        (ReadAgainUnderAnotherName(), "relu"),
        (WritesBothNames(), "relu"),
        (WritesOutOfTwoViews().requires_grad_(False), "view+relu"),
    ],
    ids=["dropout", "relu", "both names", "out"],
)
def test_a_write_behind_a_split_that_another_name_of_the_value_would_miss_is_refused(
    model: nn.Module, split: str
) -> None:
    with pytest.raises(SplitError) as caught:
        fxcollab.transform(model, splits=[split])
    assert "storage that crosses the split twice" in caught.value.what
    assert "may share the storage of" in str(caught.value.why)
    assert caught.value.where and caught.value.hint


def test_one_operation_may_write_two_crossing_values_that_are_no_aliases() -> None:
    class WritesTwo(Chain):
        def forward(self, x: Tensor) -> Tensor:
            one, two = self.first(x), self.second(x)
            torch._foreach_mul_([one, two], 0.5)
            return self.head(one + two)

    proven(WritesTwo(), ["first+second"])


def test_the_same_write_in_front_of_the_split_is_no_reason_to_refuse() -> None:
    class WritesBefore(Chain):
        def forward(self, x: Tensor) -> Any:
            before = self.first(x)
            after = F.relu(before, inplace=True)
            return self.head(self.second(after)), before

    proven(WritesBefore(), ["second"])


@pytest.mark.parametrize(
    "operation",
    [
        lambda net, x: x.contiguous(),
        lambda net, x: x.to(torch.complex64).real,
        lambda net, x: x.to(x.dtype),
        lambda net, x: F.dropout(x, 0.5, net.training),
        lambda net, x: net.unchanged(x),
        lambda net, x: net.second(x),
        lambda net, x: x.mul_(0.5),
        lambda net, x: F.relu(x, inplace=True),
        lambda net, x: x.detach().clone(),
    ],
    ids=["contiguous", "converted", "to", "dropout", "identity", "module", "mul_", "relu", "clone"],
)
def test_what_returns_its_input_under_no_grad_keeps_its_gradient(operation: Any) -> None:
    class Without(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.unchanged = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            first = self.first(x)
            with torch.no_grad():
                first = operation(self, first)
            return self.head(first)

    model = Without()
    train_model = proven(model, ["first"])
    for training in (True, False):
        model.zero_grad()
        sum(output.sum() for output in train_model.train(training)(X)).backward()
        gradient = model.first.weight.grad
        model.zero_grad()
        model.train(training)(X).sum().backward()
        assert (gradient is None) == (model.first.weight.grad is None)
    model.train()


def test_an_example_is_computed_on_lists_that_can_be_written_to() -> None:
    class Exchanges(nn.Module):
        """Kept whole; writes into the list it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, values: list[Tensor]) -> list[Tensor]:
            for i, layer in enumerate(self.layers):
                values[i] = layer(values[i])
            return values

    class Exchanging(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.exchange = Exchanges()

        def forward(self, x: Tensor) -> Tensor:
            values = self.exchange([self.first(x), x])
            if isinstance(values, list) and len(values) == 2:
                values = [values[0] + values[1]]
            return self.head(self.second(values[0]))

    proven(Exchanging(), ["second"])
    proven(Exchanging(), ["first"])


def test_an_item_that_is_copied_is_no_view() -> None:
    class TakesRows(Chain):
        def forward(self, x: Tensor) -> Any:
            first = self.first(x)
            rows = first[[1, 0, 2]]
            places = self.second(first).argmax(0)
            more = first[places]
            rows[:, 0] = 0.5
            more.mul_(self.second(rows).mean())
            return self.head(rows), more, first

    proven(TakesRows(), ["first"])
    proven(TakesRows(), ["first"], granularity="op")


def test_an_attribute_read_under_no_grad_carries_no_gradient() -> None:
    class RealPart(Chain):
        def forward(self, x: Tensor) -> Tensor:
            value = torch.complex(x, self.first(x))
            with torch.no_grad():
                imaginary = value.imag
            return self.head(self.second(imaginary))

    model = RealPart()
    train_model = proven(model, ["second"])
    sum(output.sum() for output in train_model(X)).backward()
    assert model.first.weight.grad is None
    assert model.second.weight.grad is not None


class Decoder(nn.Module):
    """Its query is asked for in front of the split, and it is called behind."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.inner = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        return self.inner(x * query)


def test_a_part_that_is_called_in_the_trunk_doesnt_share_the_rest_of_its_module() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Sequential(Decoder())

        def forward(self, x: Tensor) -> Tensor:
            query = self.decoder[0].query(x)
            return self.decoder[0](self.encoder(x), query)

    train_model = proven(Asks(), ["encoder"])
    own, peer = (train_model.get_submodule(f"{prefix}decoder.0").inner for prefix in ("", "peers.b1."))
    assert own.weight is not peer.weight


def test_initialising_peers_doesnt_write_to_weights_that_they_share() -> None:
    class Tied(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)))

    model = Tied()
    untouched = Untouched(model)
    fxcollab.transform(model, splits=["first"], seed=0)
    assert untouched.differences() == []
    proven(model, ["first"])


def test_a_buffer_that_is_read_in_the_trunk_and_written_by_branches_is_given_up_aloud() -> None:
    class RunningMean(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.mean: Tensor
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x - self.mean)
            second = self.second(first)
            self.mean.mul_(0.9).add_(second.detach().mean(0))
            return self.head(second)

    with pytest.warns(UserWarning, match="buffers mean are used before and behind a split"):
        fxcollab.transform(RunningMean(), splits=["first"], seed=0)


def test_an_example_sees_the_attributes_that_the_forward_began_with() -> None:
    class Moves(Chain):
        """Sets a plain attribute to a proxy, and asks afterwards."""

        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.arange(4.0)

        def forward(self, x: Tensor) -> Tensor:
            self.positions = self.positions.to(x.device)
            x = x + self.positions[: x.shape[1]]
            if x.shape[1] != 4:
                raise ValueError("four features are needed")
            return self.head(self.second(self.first(x)))

    model = Moves()
    positions = model.positions
    with pytest.warns(UserWarning, match="positions is not kept"):
        train_model = fxcollab.transform(model, splits=["second"], example_inputs=(X,), seed=0)
    assert fxcollab.verify(model, train_model, (X,))
    assert model.positions is positions


class WrittenInTheTrunkAfterIt(Chain):
    """What crosses is another name of what the trunk writes into afterwards."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.dropout, self.relu = way, nn.Dropout(0.3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        crossing = self.dropout(x) if self.way == "dropout" else x.view(-1, 4)
        self.relu(x)
        return self.head(crossing)


@pytest.mark.parametrize("way", ["dropout", "view"])
def test_a_write_in_the_trunk_reaches_what_crosses_under_another_name(way: str) -> None:
    proven(WrittenInTheTrunkAfterIt(way), [way], pattern="simple")


def test_what_a_forward_sets_while_it_is_traced_is_asked_for_nothing() -> None:
    class Counts(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return _asks(self.head(self.second(self.first(x))))

    captured = fxcollab.capture(Counts(), ["first"], (X,))
    assert [node.op for node in captured.graph.nodes][-1] == "output"


def _asks(x: Tensor) -> Tensor:
    return x * 0.9 if float(x.detach().sum()) > 0 else x - 0.1  # can't be traced


class WrittenBesideACopy(nn.Module):
    """The split's value is the input itself; the branches call ``hooked`` on it, and then the input is written."""

    def __init__(self, first: nn.Module, hooked: nn.Module, relu: nn.Module) -> None:
        super().__init__()
        self.first, self.hooked, self.relu = first, hooked, relu
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.hooked(y)
        self.relu(x)
        result: Tensor = self.last(y)
        return result


class Hooked(nn.Module):
    """Has a hook, and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.hooked = nn.ReLU(inplace=True), spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.hooked(self.relu(x))
        return result


class Unseen(nn.Module):
    """Asks for values that a model on meta doesn't have, so that what it does can't be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x) if float(x.sum()) > 0 else x
        return result


FIRST = pytest.mark.parametrize("first", [nn.Dropout(0.3), nn.Identity()], ids=["dropout", "identity"])


@FIRST
@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), Hooked()], ids=["relu", "hooked"])
def test_modules_with_hooks_write_only_what_they_are_seen_to_write(first: nn.Module, relu: nn.Module) -> None:
    model = WrittenBesideACopy(first, spectral_norm(nn.Linear(4, 4)), copy.deepcopy(relu))
    assert copies(proven(model, ["first"], pattern="simple")) == 0


@FIRST
@pytest.mark.parametrize(
    ("relu", "how"), [(nn.ReLU(inplace=True), "writes"), (Unseen(), "may write")], ids=["relu", "unseen"]
)
def test_a_write_beside_a_value_that_branches_may_write_is_refused(
    first: nn.Module, relu: nn.Module, how: str
) -> None:
    model = WrittenBesideACopy(first, Unseen(), relu).to("meta")
    with pytest.raises(fxcollab.SplitError, match=f"'relu' {how} in place into a value of which every branch has"):
        fxcollab.transform(model, "simple", ["first"], example_inputs=(X.to("meta"),))


class WrittenBetween(nn.Module):
    """The branches' copies are taken for ``early``, before the write beside the split; ``last`` writes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.early = nn.Dropout(0.3), nn.Linear(4, 4)
        self.relu, self.last = nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(x)
        early = self.early(y)
        self.relu(x)
        result: Tensor = self.head(self.last(y) + early)
        return result


def test_a_write_between_the_copy_and_the_branchs_own_write_is_refused() -> None:
    with pytest.raises(fxcollab.SplitError, match="'relu' writes in place into a value of which every branch has"):
        fxcollab.transform(WrittenBetween(), "simple", ["dropout"])


class CutUnderNoGrad(nn.Module):
    """What returns its very input keeps the input's gradient under no_grad, also where it is the split's value."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.same, self.head = way, nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.same(x) if self.way == "same" else x.contiguous()
        result: Tensor = self.head(y)
        return result


@pytest.mark.parametrize("way", ["same", "contiguous"])
def test_a_split_under_no_grad_cuts_at_what_the_forward_goes_on_with(way: str) -> None:
    proven(CutUnderNoGrad(way), [way], pattern="simple")


class WrittenWithGaps(nn.Module):
    """The crossing value is every other column of something: BatchNorm sums another layout in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu, self.head = nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([x, x.sin()], 1)[:, ::2]
        self.norm(wide)
        result: Tensor = self.head(self.relu(wide))
        return result


def test_a_branchs_copy_is_laid_out_like_the_value() -> None:
    proven(WrittenWithGaps(), ["getitem"], pattern="simple")


@pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.t()[1:], lambda x: x[None, 1:, :3].mT])
def test_a_copy_keeps_strides_and_gradients(make: Any) -> None:
    x = torch.randn(6, 8, requires_grad=True)
    value = make(x)
    made = fxcollab.private_copy(value)
    assert torch.equal(made, value) and made.stride() == value.stride()
    assert made.untyped_storage()._cdata != value.untyped_storage()._cdata
    weights = torch.randn_like(value)
    (found,) = torch.autograd.grad((made * weights).sum(), x)
    (expected,) = torch.autograd.grad((value * weights).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "make", [lambda x: x[:, :1].expand(6, 8), lambda x: x[0].unfold(0, 3, 1)], ids=["expanded", "unfolded"]
)
def test_a_copy_of_what_can_not_be_written_is_a_plain_one(make: Any) -> None:
    value = make(torch.randn(6, 8))
    assert torch.equal(fxcollab.private_copy(value), value)
