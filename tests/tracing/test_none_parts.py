"""Parts of a module's result that are None."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from tests.speeds import slow_but
from tests.tracing.question_helpers import (
    GIVEN_OR_GUESSED,
    MORE,
    NOTES,
    Net,
    X,
    agrees,
    made,
    proven,
    proven_or_refused,
)


class HasNone(nn.Module):
    """Kept whole; a part of what it returns is None, always or where it isn't trained."""

    def __init__(self, kind: str = "pair", also_in_training: bool = True) -> None:
        super().__init__()
        self.layer, self.kind, self.also_in_training = nn.Linear(8, 8), kind, also_in_training

    def forward(self, x: Tensor) -> Any:
        h, other = self.layer(x), x if self.training and not self.also_in_training else None
        return {
            "pair": (h, other), "three": (h, other, x), "dict": {"h": h, "other": other}, "named": Named(h, other),
            "fields": Fields(h, other), "none": other,
        }[self.kind]  # fmt: skip


Named = namedtuple("Named", "h other")


@dataclass
class Fields:
    h: Tensor
    other: Tensor | None


class Unpacks(Net):
    kind = "pair"

    def __init__(self, also_in_training: bool = True) -> None:
        super().__init__()
        self.part = HasNone(self.kind, also_in_training)

    def forward(self, x: Tensor) -> Any:
        a, b = self.parts(x)
        return self.tail(b * 3 if b is not None else a * 2)

    def parts(self, x: Tensor) -> Any:
        a, b = self.part(x)
        return a, b


class Indexes(Unpacks):
    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs[0], outputs[1]


class UnpacksASlice(Unpacks):
    kind = "three"

    def parts(self, x: Tensor) -> Any:
        a, b = self.part(x)[:2]
        return a, b


class IndexesASlice(Unpacks):
    kind = "three"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)[:2]
        return outputs[0], outputs[-1]


class LooksUp(Unpacks):
    kind = "dict"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs["h"], outputs["other"]


class UnpacksNames(Unpacks):
    kind = "named"


NONES = [Unpacks, Indexes, UnpacksASlice, IndexesASlice, LooksUp, UnpacksNames]


@pytest.mark.parametrize("inputs", GIVEN_OR_GUESSED)
@pytest.mark.parametrize("also_in_training", slow_but([True], [True, False]), ids=["always", "in eval mode"])
@pytest.mark.parametrize("make", slow_but([Unpacks, IndexesASlice, LooksUp], NONES))
def test_a_part_that_is_none_is_none(make: type[Unpacks], also_in_training: bool, inputs: Any) -> None:
    model = make(also_in_training)
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert train_model.meta[NOTES] == ()
    for training in (True, False):
        assert agrees(train_model.train(training), model.train(training), MORE)


class OfTwo(Indexes):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x + y.view(5, -1)[0, 0])  # no usual shape


def test_where_nothing_can_be_guessed_it_is_said_that_none_was_not_looked_for() -> None:
    with pytest.warns(UserWarning, match="^limitation: whether a part of what part returns is None is not known"):
        fxcollab.transform(OfTwo(), "simple", ["b"], seed=0)
    train_model = proven(OfTwo(), (X, torch.ones(5)))
    assert train_model.meta[NOTES] == ()


class ReadsANamedPart(Unpacks):
    kind = "named"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs.h, outputs.other


class ReadsAField(ReadsANamedPart):
    kind = "fields"


class GetsAnEntry(Unpacks):
    kind = "dict"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs["h"], outputs.get("other")


class GetsAMissingEntry(Unpacks):
    kind = "dict"

    def parts(self, x: Tensor) -> Any:
        outputs = self.part(x)
        return outputs["h"], outputs.get("missing")


class TakesTheWhole(Unpacks):
    kind = "none"

    def parts(self, x: Tensor) -> Any:
        return self.a(x), self.part(x)


def _pair_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return (x, None) if x.sum() > -1e9 else (x, x)  # can't be traced


class TakesAHelpersPart(Unpacks):
    def parts(self, x: Tensor) -> Any:
        outputs = _pair_of(self.a(x))
        return outputs[0], outputs[1]


@pytest.mark.parametrize(
    "make",
    slow_but(
        [ReadsAField, GetsAnEntry, TakesAHelpersPart],
        [
            ReadsANamedPart,
            ReadsAField,
            GetsAnEntry,
            GetsAMissingEntry,
            TakesTheWhole,
            TakesAHelpersPart,
        ],
    ),
)
def test_none_is_none_however_it_is_read(make: type[Unpacks]) -> None:
    proven_or_refused(make())
