"""Buffers that a forward assigns, and lists that modules change: what they leave is left, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Any:
        x = self.c(self.b(self.a(x)))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class InTraining(Averages):
    def forward(self, x: Tensor) -> Any:
        before = self.mean
        x = self.c(self.b(self.a(x)))
        if self.training:
            self.calls = self.calls + 1
            self.mean = torch.lerp(self.mean, x.detach().mean(0), 1 / self.calls)
        return x * (self.mean - before)


class InAnOpenedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), Averages(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.inner(self.first(x)))


class WithoutReading(Averages):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        self.mean = x.detach().amax(0)
        return self.c(self.b(x))


class Remembers(Averages):
    """Keeps the value of the call before: what was read is another tensor than what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("before", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x) + self.before)
        self.before = self.mean
        self.mean = x.detach().mean(0)
        return self.c(x)


class Swaps(Remembers):
    def forward(self, x: Tensor) -> Any:
        self.before, self.mean = self.mean, self.before
        return self.c(self.b(self.a(x)) * self.mean)


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) / self.scale


class AssignsToAChild(nn.Module):
    """The child, which is kept whole, reads what was assigned before it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.child, self.b = nn.Linear(4, 4), Divides(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        self.child.scale = x.detach().abs().mean(0) + 1
        return self.b(self.child(x))


@pytest.mark.parametrize(
    ("net", "splits"),
    [
        (Remembers, ["a"]),
        (Swaps, ["a"]),
        (AssignsToAChild, ["a"]),
        (Averages, ["a", "b"]),
        (InTraining, ["a"]),
        (InAnOpenedModule, ["inner.a", "inner.b"]),
        (WithoutReading, ["a"]),
        (WithoutReading, ["b"]),
    ],
)
def test_what_is_assigned_to_a_buffer_is_written_into_it_at_every_call(
    net: type[nn.Module], splits: list[str]
) -> None:
    model = net()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train_model = fxcollab.transform(model, splits=splits, example_inputs=(X,), seed=0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert not [note for note in train_model.meta["fxcollab_limitations"] if "is not kept" in note]


class RemembersInTraining(Remembers):
    """In train mode no node reads what is written, so that only eval mode tells to which level it belongs."""

    def forward(self, x: Tensor) -> Any:
        x = self.c(self.b(self.a(x)))
        if self.training:
            self.before = self.mean
            self.mean = x.detach().mean(0)
        return x + self.before


class CountsInTraining(Averages):
    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x))
        if self.training:
            self.calls += 1
            return self.c(x)
        return self.c(x) * self.calls


@pytest.mark.parametrize("net", [RemembersInTraining, CountsInTraining])
def test_a_buffer_that_one_mode_only_writes_has_the_level_of_the_other_ones_reads(net: type[nn.Module]) -> None:
    model = net()
    train_model = fxcollab.transform(model, splits=["a"], example_inputs=(X,), seed=0)
    assert not train_model.meta["fxcollab_limitations"]
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    written = {"before", "mean"} if net is RemembersInTraining else {"calls"}
    assert {f"peers.b1.{name}" for name in written} <= train_model.state_dict().keys()


class Removes(Averages):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x) if self.mean is None else self.a(x) + 1
        self.mean = None
        return self.b(x)


class HasTwoNames(Averages):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", self.mean)


@pytest.mark.parametrize(("net", "why"), [(Removes, "removes buffer mean"), (HasTwoNames, "has other names")])
def test_what_cannot_be_written_into_a_buffer_is_refused(net: type[nn.Module], why: str) -> None:
    with pytest.raises(fxcollab.CaptureError) as error:
        fxcollab.transform(net(), splits=["a"], example_inputs=(X,))
    assert why in str(error.value.why)


class Writes(nn.Module):
    """Kept whole; leaves something in a list or dict that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any) -> Any:
        key: Any = "last" if isinstance(cache, dict) else 0
        last, cache[key] = cache[key], self.linear(x)
        return cache[key] if last is None else cache[key] + last


class HandsOut(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.stem, self.a, self.c, self.b = make, nn.Linear(4, 4), Writes(), Writes(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        cache = self.make()
        return self.b(self.c(self.a(self.stem(x), cache), cache))


@pytest.mark.parametrize("make", [lambda: [None], lambda: {"last": None}, lambda: [torch.zeros(4)]])
def test_a_module_that_changes_a_list_of_the_forward_is_refused(make: Any) -> None:
    with pytest.raises(
        fxcollab.CaptureError, match="'a' changes a list or dict that the forward hands to other"
    ) as error:
        fxcollab.transform(HandsOut(make), splits=["stem"], example_inputs=(X,))
    assert "node 'a'" in str(error.value.where)
    inside = nn.Sequential(nn.Linear(4, 4), HandsOut(make))  # as the hint says
    fxcollab.verify(inside, fxcollab.transform(inside, splits=["0"], seed=0), (X,)).raise_if_failed()
