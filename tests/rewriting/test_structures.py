"""Structures that cross a split: packed sequences, named tuples, data classes and other objects with tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fxcollab
from tests.speeds import slow_but
from tests.tracing.question_helpers import MORE, X, agrees, proven

LENGTHS = torch.tensor([8, 7, 3, 8])


class Recurrent(nn.Module):
    def __init__(self, *, sort: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(6, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.fc, self.sort = nn.Linear(8, 3), sort

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=not self.sort)
        return self.head(self.second(self.between(self.first(packed)[0])))

    def between(self, packed: PackedSequence) -> PackedSequence:
        return packed

    def head(self, outputs: Any) -> Tensor:
        return self.fc(pad_packed_sequence(outputs[0], batch_first=True)[0].mean(1))


class Sorted(Recurrent):
    """Two of the four parts of its sequences are None."""

    def __init__(self) -> None:
        super().__init__(sort=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(x, lengths.sort(descending=True).values)


class Rebuilds(Recurrent):
    def between(self, packed: PackedSequence) -> PackedSequence:
        return PackedSequence(packed.data.relu(), *packed[1:])


class Replaces(Recurrent):
    def between(self, packed: PackedSequence) -> PackedSequence:
        return packed._replace(data=packed.data.tanh())


class ReadsTheState(Recurrent):
    def head(self, outputs: Any) -> Tensor:
        return self.fc(outputs[1][0][-1])


NETWORKS = [Recurrent, Sorted, Rebuilds, Replaces, ReadsTheState]


@pytest.mark.parametrize("split", slow_but(["first"], ["first", "second"]))
@pytest.mark.parametrize("make", slow_but([Recurrent], NETWORKS))
def test_packed_sequences_cross_a_split(make: type[Recurrent], split: str) -> None:
    model, inputs = make(), (torch.randn(4, 8, 6), LENGTHS)
    train_model = proven(model, inputs, [split])
    assert agrees(train_model, model, torch.randn(3, 9, 6), torch.tensor([2, 9, 5]))


class Named(NamedTuple):
    values: Tensor
    mask: Tensor
    count: int
    extra: Tensor | None


@dataclass
class Data:
    values: Tensor
    mask: Tensor
    count: int
    extra: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    values: Tensor
    mask: Tensor
    count: int
    extra: Tensor | None = None


class Plain:
    def __init__(self, values: Tensor, mask: Tensor, count: int, extra: Tensor | None) -> None:
        self.values, self.mask, self.count, self.extra = values, mask, count, extra


class Stage(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(8, 8), kind

    def forward(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = self.kind(value, value[:, 0] > 0, len(value), None)
        return self.kind(self.fc(value.values).relu() * value.mask[:, None], value.mask, value.count, value.extra)


class Staged(nn.Module):
    """Reads a part that is None, and values on both sides of the next stage."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = Stage(kind), Stage(kind), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.a(x)
        values = found.values if found.extra is None else found.values + found.extra
        return self.c(self.b(found).values + values) / found.count


@pytest.mark.parametrize("kind", slow_but([Named, Data], [Named, Data, Frozen, Plain]))
def test_objects_with_tensors_cross_a_split(kind: Any) -> None:
    model = Staged(kind)
    train_model = proven(model, (X,), ["a"])
    assert agrees(train_model, model, MORE)


class Opaque:
    """A locked object: it can't be copied."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("it is locked")


class Locks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Opaque:
        return Opaque(self.fc(x))


class ReadsLocked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Locks(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).values)


def test_what_can_not_be_copied_and_carries_a_gradient_is_refused_with_its_type() -> None:
    with pytest.raises((TypeError, fxcollab.FxCollabError), match="Opaque"):
        fxcollab.transform(ReadsLocked(), "simple", ["a"], seed=0, example_inputs=(X,))(X)
